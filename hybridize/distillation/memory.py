"""How much memory a training step takes: of a GPU by its allocator, of a CPU by what the process has resident."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from hybridize.checkpoint.resources import memory_limit_bytes

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"  # proc(5)


class Meter(Protocol):
    """What the memory of a device holds, in bytes."""

    def capacity_bytes(self) -> float:
        """What is free and what this process has of it."""

    def reset(self) -> None:
        """Begins a new peak."""

    def peak_bytes(self) -> float:
        """The most that was in use since `reset`."""

    def held_bytes(self) -> float:
        """What is in use now."""


class GpuMeter:
    """The caching allocator of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    def capacity_bytes(self) -> float:
        free, total = torch.cuda.mem_get_info(self.device)
        allowed: float = total * torch.cuda.get_per_process_memory_fraction(self.device)
        return min(free + torch.cuda.memory_reserved(self.device), allowed)

    def reset(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> float:
        return torch.cuda.max_memory_allocated(self.device)

    def held_bytes(self) -> float:
        return torch.cuda.memory_allocated(self.device)


class ProcessMeter:
    """The resident memory of this process, all of Python included.

    Where the system cannot begin a new peak (it is not Linux), the peak is that since the process began.
    """

    def capacity_bytes(self) -> float:
        limit = memory_limit_bytes()
        return float("inf") if limit is None else limit

    def reset(self) -> None:
        with suppress(OSError):
            _CLEAR.write_text(_CLEAR_PEAK, encoding="ascii")

    def peak_bytes(self) -> float:
        # Not by getrusage where it can be helped: a child process begins with the peak of its parent there.
        return max(_status_bytes("VmHWM"), _status_bytes("VmRSS")) or _usage_bytes()

    def held_bytes(self) -> float:
        return _status_bytes("VmRSS") or _usage_bytes()


def meter_of(device: torch.device) -> Meter:
    """The meter of a device."""
    return GpuMeter(device) if device.type == "cuda" else ProcessMeter()


def _status_bytes(field: str) -> int:
    """A line of /proc/self/status; 0 where there is none."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    found = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(next(found, "0")) * 1024


def _usage_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
