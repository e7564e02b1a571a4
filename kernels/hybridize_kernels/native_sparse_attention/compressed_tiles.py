"""What the kernels over compressed blocks share: tile sizes, and which queries the rows of a program are.

A row is a (query, query head) pair of one key head's group, so that all heads of the group share every block that is
loaded. The group is padded to a power of two, GP: lane m is query m // GP and head m % GP.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import TILE

VARIABLE = "HYBRIDIZE_COMPRESSED_BLOCK_TILES"
"""Overrides the table: `forward=64,64,4,3;scores=...;query=...;key=...`, in the order of `Tile`'s fields."""

LOG2_E = 1.4426950408889634
TILE_FIELDS = tl.constexpr(8)
BLOCK_FIELDS = tl.constexpr(9)


@dataclass(frozen=True)
class Tile:
    """rows: of (query, head) pairs; keys: blocks; warps, stages and most registers a thread of the kernel (0: any)."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """What a kernel is launched with."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.keys,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **limit,
        }


@dataclass(frozen=True)
class Tiles:
    """Tiles of the forward kernel, of the scores, of the kernel for dq and of that for dk and dv."""

    forward: Tile
    scores: Tile
    query: Tile
    key: Tile


_HALF = {
    64: Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 32, 4, 3), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),
}
"""By padded head size, for fp16 and bf16."""

_FLOAT = {
    64: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    256: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
}
"""For fp32, whose products run outside the matrix units."""


def tiles_of(q: Tensor, heads: int) -> Tiles:
    """The tiles of a call with q `[B, T, HQ, D]` and H key heads."""
    return _tiles(q.shape[3], q.shape[2] // heads, q.dtype == torch.float32, os.environ.get(VARIABLE))


@cache
def _tiles(head_size: int, group: int, single: bool, override: str | None) -> Tiles:
    tiles = (_FLOAT if single else _HALF)[max(64, power_of_two(head_size))]
    if override:
        given = dict(part.split("=") for part in override.split(";"))
        tiles = replace(tiles, **{name: Tile(*map(int, values.split(","))) for name, values in given.items()})
    padded = power_of_two(group)
    # The rows are the second side of the product that makes the scores, which may be narrow; where they are the first,
    # the matrix units take no fewer than 64, and lanes without a head fill them.
    scores = replace(tiles.scores, rows=max(padded, min(tiles.scores.rows, TILE * padded)))
    forward, query = (replace(tile, rows=max(tile.rows, padded)) for tile in (tiles.forward, tiles.query))
    return Tiles(forward, scores, query, tiles.key)


def power_of_two(number: int) -> int:
    """The least power of two that is at least a number above zero."""
    return 1 << (number - 1).bit_length()


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


@triton.jit  # type: ignore[untyped-decorator]
def part_of_tile(tiles_ptr, tile, part, BLOCK_Q: tl.constexpr):
    """Of a part of a tile: row of the batch (int64), tokens [first, end), position of `first`, number of its document's
    block 0, and which query of the tile `first` is."""
    tiles_ptr += tile * TILE_FIELDS
    batch = tl.load(tiles_ptr).to(tl.int64)
    token = tl.load(tiles_ptr + 1)
    low = tl.load(tiles_ptr + 2)
    high = tl.load(tiles_ptr + 3)
    position = tl.load(tiles_ptr + 4)
    base = tl.load(tiles_ptr + 6).to(tl.int64)
    first = tl.maximum(token + part * BLOCK_Q, low)
    end = tl.minimum(token + part * BLOCK_Q + BLOCK_Q, high)
    return batch, first, end, position + first - token, base, first - token


@triton.jit  # type: ignore[untyped-decorator]
def lanes_of(queries, G: tl.constexpr, GP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of every lane: which query and head of the group it is, and whether it is one: others repeat a real one."""
    lanes = tl.arange(0, BLOCK_M)
    query = lanes // GP
    member = lanes % GP
    valid = (query < queries) & (member < G)
    return tl.minimum(query, queries - 1), tl.minimum(member, G - 1), valid


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(pointers, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a `[*, D]` tensor from pointers to their first elements; zeros beyond D."""
    features = tl.arange(0, BLOCK_D)
    at = pointers[:, None] + features[None, :]
    if BLOCK_D > D:
        return tl.load(at, mask=(features < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit  # type: ignore[untyped-decorator]
def store_rows(pointers, rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the valid rows of `[*, BLOCK_D]` to pointers to their first elements, in the pointers' dtype."""
    features = tl.arange(0, BLOCK_D)
    at = pointers[:, None] + features[None, :]
    tl.store(at, rows.to(pointers.dtype.element_ty), mask=valid[:, None] & (features < D)[None, :])
