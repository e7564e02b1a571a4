"""Tile sizes of the gate gradient."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..retained_attention.layout import power_of_two

VARIABLE = "HYBRIDIZE_GATE_GRADIENT_TILES"
"""Overrides the table: `64,128,4,2`, in the order of `Tile`'s fields."""


@dataclass(frozen=True)
class Tile:
    """rows: queries of one head; keys; warps and stages of the kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


def padded_head(head_size: int) -> int:
    """Columns of a tile that holds a head."""
    return max(16, power_of_two(head_size))


def tile_for(head_size: int, dtype: torch.dtype) -> Tile:
    """The tile of a call; its two products of fp32 and the tiles they are of share registers and shared memory."""
    if override := os.environ.get(VARIABLE):
        return Tile(*map(int, override.split(",")))
    if dtype == torch.float32:  # exact products run on the ordinary cores, from registers: in thin slices
        return Tile(64, 64, 4, 1)
    if padded_head(head_size) <= 64:
        return Tile(64, 128, 4, 2)
    # At 256, the keys of a tile and one tile of queries already take 160 of the 227 KiB of shared memory.
    return Tile(64, 128, 8, 2) if padded_head(head_size) <= 128 else Tile(64, 128, 8, 1)


def slice_for(head_size: int, dtype: torch.dtype) -> int:
    """Columns of D that go into one product."""
    return 16 if dtype == torch.float32 else padded_head(head_size)
