"""Tile sizes of all kernels of the op, and the constants that they are compiled with."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .layout import TILE, power_of_two

VARIABLE = "HYBRIDIZE_NATIVE_SPARSE_ATTENTION_TILES"
"""Overrides the table: `compressed=64,32,4,3;union=64,0,4,3;limit=44;entries=512`, in the order of `Tile`'s fields."""

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """rows: of (query, head) pairs; keys: pooled ones, 0 where they are those of a block; warps, stages and most
    registers a thread of the kernel (0: any)."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """What a kernel is launched with."""
        keys = {"BLOCK_N": self.keys} if self.keys else {}
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {
            "BLOCK_M": self.rows,
            **keys,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **limit,
        }


@dataclass(frozen=True)
class Tiles:
    """Tiles of the kernels.

    Attributes:
        compressed, scores, compressed_query, compressed_key: of the compressed branch forward, of the blocks' scores,
            of its dq, and of its dk and dv.
        union, pairs, gradient: of the selected branch over unions, over lists by block, and of its gradient over them.
        limit: blocks, beside the near ones, of the longest union that is walked as one.
        entries: pairs of a piece of work of the kernels over lists by block.
    """

    compressed: Tile
    scores: Tile
    compressed_query: Tile
    compressed_key: Tile
    union: Tile
    pairs: Tile
    gradient: Tile
    limit: int = 44
    entries: int = 512


_COMPRESSED_HALF = {
    64: (Tile(64, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    128: (Tile(64, 32, 4, 3), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),
}
"""By padded head size, for fp16 and bf16; chosen on an H100 at 128."""

_COMPRESSED_FLOAT = {
    64: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
}
"""For fp32, whose products run outside the matrix units."""

_SELECTED_HALF = {
    64: (Tile(64, 0, 4, 3), Tile(64, 0, 4, 3), Tile(64, 0, 4, 4)),
    128: (Tile(64, 0, 4, 3), Tile(64, 0, 4, 3), Tile(64, 0, 4, 3)),
    256: (Tile(64, 0, 8, 2), Tile(64, 0, 8, 2), Tile(32, 0, 8, 2)),
}
"""By padded head size where a block has 64 keys or fewer, by twice that where it has 128."""

_SELECTED_FLOAT = {
    64: (Tile(32, 0, 4, 1), Tile(32, 0, 4, 1), Tile(32, 0, 4, 1)),
    128: (Tile(32, 0, 8, 1), Tile(32, 0, 8, 1), Tile(32, 0, 8, 1)),
    256: (Tile(16, 0, 8, 1), Tile(16, 0, 8, 1), Tile(16, 0, 8, 1)),
}


def tiles_of(q: Tensor, heads: int, block_size: int) -> Tiles:
    """The tiles of a call with q `[B, T, HQ, D]` and H key heads."""
    return _tiles(q.shape[3], q.shape[2] // heads, block_size, q.dtype == torch.float32, os.environ.get(VARIABLE))


@cache
def _tiles(head_size: int, group: int, block_size: int, single: bool, override: str | None) -> Tiles:
    compressed, selected = (_COMPRESSED_FLOAT, _SELECTED_FLOAT) if single else (_COMPRESSED_HALF, _SELECTED_HALF)
    size = max(64, power_of_two(head_size))
    tiles = Tiles(*compressed[size], *selected[size * max(64, block_size) // 64])
    for part in override.split(";") if override else ():
        name, values = part.split("=")
        numbers = [int(value) for value in values.split(",")]
        given: dict[str, Any] = {name: numbers[0] if name in ("limit", "entries") else Tile(*numbers)}
        tiles = replace(tiles, **given)
    padded = power_of_two(group)
    # No program has a part of a query's group. The scores' rows are the second side of a product, which may be narrow;
    # where rows are the first, the matrix units take no fewer than 64, and lanes without a head fill them.
    names = ("compressed", "compressed_query", "union", "pairs", "gradient")
    rows = {name: max(getattr(tiles, name).rows, padded) for name in names}
    rows["scores"] = max(padded, min(tiles.scores.rows, TILE * padded))
    changed: dict[str, Any] = {name: replace(getattr(tiles, name), rows=most) for name, most in rows.items()}
    return replace(tiles, **changed)


def constants_of(q: Tensor, heads: int, block_size: int, tile: Tile) -> dict[str, Any]:
    """The constants of a kernel over q `[B, T, HQ, D]` by tiles of the layout."""
    group = q.shape[2] // heads
    return {
        "G": group,
        "GP": max(power_of_two(group), tile.rows // TILE),
        **size_constants(q, block_size),
        **tile.options(),
    }


def size_constants(x: Tensor, block_size: int) -> dict[str, Any]:
    """Head size, block size and precision of x `[..., D]`."""
    size = x.shape[-1]
    return {
        "D": size,
        "BLOCK_D": max(16, power_of_two(size)),
        "BS": block_size,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }


def num_parts(constants: dict[str, Any]) -> int:
    """Programs that share one tile of queries."""
    return int(TILE * constants["GP"] // constants["BLOCK_M"])
