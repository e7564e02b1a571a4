"""What is measured: a name, the model behind it, and how a decoder of a shape is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hybridize.inference.bench.dense import Attention, DenseBaseline

NAMES = {"cudnn": "cuDNN", "flash": "flash"}


class Timed(Protocol):
    """What reads texts and writes greedily, with states of a fixed size."""

    batch: int
    context_tokens: int

    def read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Appends texts[i] to row i; returns the logits [B, V] after the last token of each."""

    def run(self, steps: int) -> None:
        """So many greedy steps of all rows; returns before the device is done."""

    def pretend(self, tokens: int) -> None:
        """States as if each row had read so many tokens."""

    def reset(self) -> None:
        """Nothing was read."""

    def state_bytes(self) -> int:
        """Bytes of the decoding state of one sequence of context_tokens."""


@dataclass(frozen=True)
class Implementation:
    """A way to run a model.

    Attributes:
        name: in the rows.
        model: its weights are counted as this implementation's memory, whoever else shares them.
        make: (batch, context_tokens) -> what is timed.
    """

    name: str
    model: Any
    make: Callable[[int, int], Timed]


def engine(name: str, model: Any, *, chunk_tokens: int | None = None, record_reading: bool = False) -> Implementation:
    """A hybrid or a plain model in our engine."""
    from hybridize.inference import Engine

    def make(batch: int, context_tokens: int) -> Timed:
        made: Timed = Engine(
            model,
            batch=batch,
            context_tokens=context_tokens,
            chunk_tokens=chunk_tokens,
            record_reading=record_reading,
        )
        return made

    make(1, 1)  # joins the projections: from here on the weights' bytes stay what they are
    return Implementation(name, model, make)


def dense(model: Any, attention: Attention, *, compiled: bool = False) -> Implementation:
    """A plain model outside of it, on a GPU by these kernels; named after them."""

    def make(batch: int, context_tokens: int) -> Timed:
        return DenseBaseline(model, batch=batch, context_tokens=context_tokens, attention=attention, compiled=compiled)

    kernels = NAMES[attention] if model.device.type == "cuda" else "torch"
    return Implementation(f"teacher, {kernels}{', compiled' if compiled else ''}", model, make)
