"""A model of which any layers see a window alone, and how far its predictions are then from its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.distillation.losses import Head
from hybridize.errors import NumbersError
from hybridize.families import family
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.configs.full_attention import FullAttentionConfig
from hybridize.mixers.configs.sliding_window import SlidingWindowConfig
from hybridize.model.swap import swap, undo
from hybridize_kernels import distillation_loss

Told = Callable[[float], None]


def _nobody(measured: float) -> None:
    pass


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer is called with beside the hidden states; it depends on the shape of a batch alone."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Sequences that go through the model together.

    Attributes:
        inputs: [B, T, hidden_size], what goes into the first layer.
        target: what the model says of them as it is.
        calls: of each layer.
        share: of all sequences.
    """

    inputs: Tensor
    target: Head
    calls: tuple[LayerCall, ...]
    share: float


@dataclass(frozen=True)
class Attention:
    """The two modules that a layer can have."""

    full: nn.Module
    windowed: nn.Module


class Windowed:
    """Measures sets of layers with full attention while all others see a window; made by `windowed`.

    Attributes:
        layers: those for which it makes a difference: their own window, if they have one, is longer.
        num_layers: of the model.
        told: hears after each measurement of a batch which share of the sequences that was.
    """

    def __init__(self, model: Any, attention: Sequence[Attention], rows: Sequence[Rows]) -> None:
        self._adapter = family(model.config.model_type)
        self._decoder_layers = list(self._adapter.layers(model.model))
        self._norm: nn.Module = model.model.norm
        self._attention = attention
        self._rows = rows
        self.num_layers = len(attention)
        self.layers = tuple(index for index, pair in enumerate(attention) if pair.full is not pair.windowed)
        self.told: Told = _nobody

    @torch.no_grad()
    def divergence(self, full: Collection[int]) -> float:
        """KL(model || model in which only the layers `full` see everything), the mean over tokens, in nats."""
        return sum(self._divergence_from(rows, rows.inputs, 0, frozenset(full)) for rows in self._rows)

    @torch.no_grad()
    def divergence_of_flips(self, full: Collection[int], flipped: Collection[int]) -> dict[int, float]:
        """`divergence` of `full` with each of `flipped` by itself taken out of it, or put into it.

        The layers below the flipped one do as they do in `full`, so one walk up the layers serves all: it branches off
        at each of them.
        """
        known = frozenset(full)
        found = dict.fromkeys(sorted(flipped), 0.0)
        for rows in self._rows:
            hidden = rows.inputs
            for index in range(max(found, default=-1) + 1):
                if index in found:
                    found[index] += self._divergence_from(rows, hidden, index, known ^ {index})
                hidden = self._through(rows, hidden, index, known)
        return found

    def _divergence_from(self, rows: Rows, hidden: Tensor, first: int, full: frozenset[int]) -> float:
        """This batch's part of the mean; `hidden` [B, T, hidden_size] goes into the layer `first`."""
        for index in range(first, self.num_layers):
            hidden = self._through(rows, hidden, index, full)
        target = rows.target
        mean, _ = distillation_loss(
            self._norm(hidden),
            target.hidden,
            target.weight,
            target.weight,
            student_bias=target.bias,
            teacher_bias=target.bias,
        )
        measured = float(mean)
        if not measured < float("inf"):
            what = f"The divergence is {measured} with full attention in layers {sorted(full)}."
            raise NumbersError(what, hint="Try --dtype float32; `hybridize verify` looks through the weights.")
        self.told(rows.share)
        # It is never negative; what rounding makes so would be the best of all choices.
        return max(measured, 0.0) * rows.share

    def _through(self, rows: Rows, hidden: Tensor, index: int, full: frozenset[int]) -> Tensor:
        pair, layer, call = self._attention[index], self._decoder_layers[index], rows.calls[index]
        self._adapter.replace(layer, pair.full if index in full else pair.windowed)
        return layer(hidden, *call.args, **call.kwargs)  # type: ignore[no-any-return]


@contextmanager
def windowed(model: Any, tokens: Tensor, config: SlidingWindowConfig, batch_sequences: int) -> Iterator[Windowed]:
    """Lets layers of a model see a window alone for as long as the block lasts; then it is as it was.

    Layers whose own window is no longer stay as they are.

    Args:
        model: a transformers causal language model of a supported family, in eval mode.
        tokens: [N, T] on its device.
        batch_sequences: how many go through it together.
    """
    adapter = family(model.config.model_type)
    layers = adapter.layers(model.model)
    windows = adapter.geometry(model.config.to_dict()).windows
    rows = list(_rows(model, tokens, batch_sequences))
    narrow = [window is not None and window <= config.window_tokens for window in windows]
    configs: list[MixerConfig] = [FullAttentionConfig() if stays else config for stays in narrow]
    originals = [adapter.attention(layer) for layer in layers]
    swap(model, configs)
    try:
        mixers = [adapter.attention(layer) for layer in layers]
        yield Windowed(model, list(map(Attention, originals, mixers)), rows)
    finally:
        undo(model)


@torch.no_grad()
def _rows(model: Any, tokens: Tensor, batch_sequences: int) -> Iterator[Rows]:
    head = model.lm_head
    calls: dict[int, tuple[LayerCall, ...]] = {}
    for start in range(0, len(tokens), batch_sequences):
        part = tokens[start : start + batch_sequences]
        inputs, heard, last_hidden = _listen(model, part)
        # Masks may be large, and are the same for batches of one shape.
        same = calls.setdefault(len(part), heard)
        target = Head(last_hidden, head.weight, head.bias).detached()
        yield Rows(inputs, target, same, len(part) / len(tokens))


def _listen(model: Any, tokens: Tensor) -> tuple[Tensor, tuple[LayerCall, ...], Tensor]:
    """What goes into the first layer [B, T, hidden_size], the calls of all, and the last hidden states."""
    inputs: list[Tensor] = []
    calls: list[LayerCall] = []

    def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = dict(kwargs)
        inputs.append(args[0] if args else others.pop("hidden_states"))
        calls.append(LayerCall(args[1:], others))
        del inputs[1:]

    layers = family(model.config.model_type).layers(model.model)
    handles = [layer.register_forward_pre_hook(hear, with_kwargs=True) for layer in layers]
    try:
        last_hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return inputs[0], tuple(calls), last_hidden
