"""What a case may fail by without costing the others theirs."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def reason(error: BaseException) -> str:
    """An error in one line."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
