"""What a process does that a crash test kills: it writes a folder with a fault point armed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hybridize.checkpoint import AtomicFolder, save_tensors


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"layer.{index}.weight": torch.full((4, 4), value + index) for index in range(5)}


def write(out: Path, value: float, fault: str | None = None) -> None:
    """Write three shards of `value` to `out`, replacing what is there; `fault` is HYBRIDIZE_FAULT."""
    if fault is not None:
        os.environ["HYBRIDIZE_FAULT"] = fault
    with AtomicFolder(out, overwrite=True, kind="converted") as folder:
        (folder / "config.json").write_text('{"model_type": "llama"}')
        save_tensors(folder, tensors(value), max_shard_bytes=128)
