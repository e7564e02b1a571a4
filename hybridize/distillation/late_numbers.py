"""Numbers of a step, brought from the device to the host without making either wait for the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Note = TypeVar("Note")


@dataclass(frozen=True)
class _OnTheWay(Generic[Note]):
    note: Note
    names: tuple[str, ...]
    values: Tensor
    arrived: Any


@dataclass(frozen=True)
class Arrived(Generic[Note]):
    """The numbers of a step.

    Attributes:
        seconds: what the step took, from the end of the one before it: by the device's own clock on a GPU, where
            several steps may be read at once.
    """

    note: Note
    numbers: dict[str, float]
    seconds: float


class LateNumbers(Generic[Note]):
    """Scalars that a device computes, read once it has.

    A GPU works on what the host queued a while ago; to read a number at once would let the host wait for the GPU, and
    the GPU for the host after that. So the numbers of a step are read a step later. A CPU has no such queue.

    Args:
        device: where the scalars are.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._behind = 1 if self._on_gpu else 0
        self._waiting: deque[_OnTheWay[Note]] = deque()
        self._last: Any = None
        self._read_at = time.perf_counter()

    def put(self, note: Note, scalars: Mapping[str, Tensor]) -> None:
        """Sends named scalars on their way; `note` comes back with them."""
        values = torch.stack([value.detach().float() for value in scalars.values()])
        arrived = None
        if self._on_gpu:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            arrived.record()
        self._waiting.append(_OnTheWay(note, tuple(scalars), values, arrived))

    def read(self, *, everything: bool = False) -> list[Arrived[Note]]:
        """What is due, oldest first: all but the newest step's on a GPU, or everything."""
        count = len(self._waiting) - (0 if everything else self._behind)
        return [self._wait_for(self._waiting.popleft()) for _ in range(count)]

    def _wait_for(self, sent: _OnTheWay[Note]) -> Arrived[Note]:
        if sent.arrived is not None:
            sent.arrived.synchronize()
        now = time.perf_counter()
        timed = self._last is not None and sent.arrived is not None
        seconds = self._last.elapsed_time(sent.arrived) / 1000 if timed else now - self._read_at
        self._last, self._read_at = sent.arrived, now
        return Arrived(sent.note, dict(zip(sent.names, sent.values.tolist(), strict=True)), seconds)
