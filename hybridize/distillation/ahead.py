"""Batches made ahead: while a step runs, a thread reads and tokenises the text of the next one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from hybridize.distillation.data import Batch, PackedSequences
from hybridize.distillation.schedule import Shape


@dataclass(frozen=True)
class Fetched:
    """The micro-batches of a step, and the place in the data after them."""

    batches: tuple[Batch, ...]
    place: dict[str, Any]


class Ahead:
    """Takes the micro-batches of steps from a stream in order, one step ahead of whoever asks for them.

    The stream's place runs ahead as well; the place to save is that of the step that was taken.

    Args:
        sequences: the stream; touched by the thread alone until the block ends.
    """

    def __init__(self, sequences: PackedSequences) -> None:
        self._sequences = sequences
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._waiting: Future[Fetched] | None = None
        self._expected: tuple[Shape, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, shape: Shape, count: int, following: tuple[Shape, int] | None) -> Fetched:
        """`count` micro-batches.

        Args:
            following: shape and count that the next call will ask for; None at the end.

        Raises:
            ValueError: this is not what the call before announced.
        """
        if self._waiting is None:
            self._begin(shape, count)
        elif self._expected != (shape, count):
            raise ValueError(f"{count} of {shape} wanted, {self._expected} announced")
        assert self._waiting is not None
        fetched = self._waiting.result()
        self._waiting = None
        if following is not None:
            self._begin(*following)
        return fetched

    def _begin(self, shape: Shape, count: int) -> None:
        self._expected = (shape, count)
        self._waiting = self._thread.submit(self._fetch, shape, count)

    def _fetch(self, shape: Shape, count: int) -> Fetched:
        batches = self._sequences.next_batches(count, shape.sequences, shape.tokens)
        return Fetched(batches, self._sequences.state_dict())
