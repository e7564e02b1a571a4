"""Tile sizes of the selected branch's kernels, and what they share."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from .layout import TILE, power_of_two

VARIABLE = "HYBRIDIZE_NATIVE_SPARSE_TILES"
"""Overrides the table: `union=64,4,3;pairs=...;gradient=...;limit=44;entries=1024`, in the order of `Tile`'s fields."""


@dataclass(frozen=True)
class Tile:
    """rows: of (query, query head) pairs; warps, stages and most registers a thread of the kernel (0: any)."""

    rows: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """What a kernel is launched with."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {
            "BLOCK_M": self.rows,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **limit,
        }


@dataclass(frozen=True)
class Tiles:
    """Tiles of the forward kernel over unions, of that over lists by block, and of the gradient over lists by block.

    Attributes:
        limit: blocks, beside the near ones, of the longest union that is walked as one.
        entries: pairs of a piece of work of the kernels over lists by block.
    """

    union: Tile
    pairs: Tile
    gradient: Tile
    limit: int = 44
    entries: int = 1024

    def queries(self, tile: Tile, group: int) -> int:
        """Neighbouring queries of a part of a tile."""
        return min(TILE, max(1, tile.rows // power_of_two(group)))


_HALF = {
    64: Tiles(Tile(64, 4, 3), Tile(64, 4, 3), Tile(64, 4, 3)),
    128: Tiles(Tile(64, 4, 3), Tile(64, 4, 3), Tile(64, 4, 3)),
    256: Tiles(Tile(64, 8, 2), Tile(64, 8, 2), Tile(32, 8, 2)),
}
"""For fp16 and bf16, by padded head size where a block has 64 tokens or fewer; twice that where it has 128."""

_FLOAT = {
    64: Tiles(Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1)),
    128: Tiles(Tile(32, 8, 1), Tile(32, 8, 1), Tile(32, 8, 1)),
    256: Tiles(Tile(16, 8, 1), Tile(16, 8, 1), Tile(16, 8, 1)),
}
"""For fp32, whose products run outside the matrix units."""


@cache
def tiles_for(head_size: int, group: int, block_size: int, dtype: torch.dtype, override: str | None = None) -> Tiles:
    """The tiles of a call; no program has more rows than the queries of a tile fill, nor fewer than one query's.

    override: what VARIABLE holds.
    """
    table = _FLOAT if dtype == torch.float32 else _HALF
    tiles = table[max(64, power_of_two(head_size)) * max(64, block_size) // 64]
    for part in override.split(";") if override else ():
        name, values = part.split("=")
        numbers = [int(value) for value in values.split(",")]
        given: dict[str, Any] = {name: numbers[0] if name in ("limit", "entries") else Tile(*numbers)}
        tiles = replace(tiles, **given)
    padded = power_of_two(group)
    union, pairs, gradient = (
        replace(tile, rows=max(16, padded, tile.rows)) for tile in (tiles.union, tiles.pairs, tiles.gradient)
    )
    # A program over a union has queries of one tile.
    union = replace(union, rows=min(union.rows, TILE * padded))
    return replace(tiles, union=union, pairs=pairs, gradient=gradient)


def tiles_override() -> str | None:
    """The environment's table of tiles."""
    return os.environ.get(VARIABLE)


@triton.jit  # type: ignore[untyped-decorator]
def load_features(pointers, features, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [*, D] tensor from their first elements' pointers; zeros beyond D.

    Lanes without a row of their own are given another's, which needs no mask; what becomes of them is not used.
    """
    at = pointers[:, None] + features[None, :]
    if BLOCK_D > D:
        return tl.load(at, mask=(features < D)[None, :], other=0.0)
    else:
        return tl.load(at)
