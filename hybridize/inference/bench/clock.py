"""Times and memory of one implementation on its device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Effort:
    """How much is run for a number.

    Attributes:
        steps, seconds: decoding steps that are timed together: at least so many, and about so long.
        repeats: of such runs; the median counts.
        warm_reads: prompts that are read before one is timed.
        read_seconds, read_repeats: prompts are read until so long, at most so often; the median counts.
    """

    steps: int
    seconds: float
    repeats: int
    warm_reads: int
    read_seconds: float
    read_repeats: int


ON_GPU = Effort(steps=32, seconds=0.2, repeats=5, warm_reads=1, read_seconds=1.0, read_repeats=5)
ON_CPU = Effort(steps=4, seconds=0.0, repeats=3, warm_reads=0, read_seconds=0.0, read_repeats=1)


def effort_on(device: torch.device) -> Effort:
    """What gives steady numbers there in bearable time."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done it."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def stopwatch(device: torch.device) -> Callable[[], float]:
    """A function that tells the seconds until the device has done all, since it was asked last."""
    _wait(device)
    last = time.perf_counter()

    def elapsed() -> float:
        nonlocal last
        _wait(device)
        now = time.perf_counter()
        since, last = now - last, now
        return since

    return elapsed


class Footprint:
    """Peak memory as if this implementation were alone on the GPU: what others hold is left out, its weights are in.

    Args:
        model: the weights of the implementation, which are on the device already.
    """

    def __init__(self, model: Any) -> None:
        self._device: torch.device = model.device
        self._foreign_bytes = 0
        if self._device.type == "cuda":
            release(self._device)
            self._foreign_bytes = torch.cuda.memory_allocated(self._device) - weight_bytes(model)

    def begin(self) -> None:
        """A pass begins."""
        if self._device.type == "cuda":
            _wait(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int | None:
        """The most that was allocated since; None on a CPU, where nobody counts."""
        if self._device.type != "cuda":
            return None
        _wait(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._foreign_bytes


def weight_bytes(model: Any) -> int:
    """Bytes of parameters and buffers; tied ones count once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that is still to be had on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    release(device)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def release(device: torch.device) -> None:
    """Gives back what nothing refers to any more: captured graphs and engines hold each other in circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
