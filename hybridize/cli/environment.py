"""What is known of the machine, for a report of a problem, and of the processes that a launcher started on it."""

from __future__ import annotations

import os
import platform
from typing import Any

from hybridize.recipe.lock import package_versions


def short_environment() -> str:
    """One line, without importing anything heavy."""
    versions = " · ".join(f"{name} {version}" for name, version in package_versions().items())
    return f"{versions} · {platform.system()} {platform.machine()}"


def environment() -> dict[str, Any]:
    """Versions, processor, memory and GPUs; imports torch."""
    import torch

    devices = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]
    return {
        "versions": package_versions(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "cuda": torch.version.cuda,
        "gpus": devices,
    }


def num_processes() -> int:
    """How many processes torchrun, accelerate launch or the like started for this command."""
    return max(_number("WORLD_SIZE", 1), 1)


def process_number() -> int:
    """This one's number among them, from 0."""
    return _number("RANK", 0) if num_processes() > 1 else 0


def _number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else otherwise


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
