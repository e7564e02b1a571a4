"""What the forward and the backward kernels share: tile sizes, loads, and where a block's keys lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

from .layout import power_of_two
from .lifetimes import enter_row

VARIABLE = "HYBRIDIZE_RETAINED_ATTENTION_TILES"
"""Overrides the table: `forward=128,64,8,2;query=...;key=...`, in the order of `Tile`'s fields."""


@dataclass(frozen=True)
class Tile:
    """rows: of (query, query head) pairs; keys; warps, stages and most registers a thread of the kernel (0: any)."""

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
    """Tiles of the forward kernel, of the kernel for dq (no more rows), and of those for dk and dv."""

    forward: Tile
    query: Tile
    key: Tile


_HALF = {
    32: Tiles(Tile(64, 32, 4, 3, 96), Tile(64, 32, 4, 3, 128), Tile(32, 64, 4, 3, 168)),
    64: Tiles(Tile(64, 32, 4, 3, 96), Tile(64, 32, 4, 3, 128), Tile(32, 64, 4, 3, 168)),
    128: Tiles(Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 2, 128), Tile(32, 64, 4, 3)),
    256: Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 1), Tile(32, 32, 8, 1)),
}
"""By padded head size, for fp16 and bf16; chosen on an H100."""

_FLOAT = {
    32: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    64: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    128: Tiles(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    256: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
}
"""For fp32, whose products run outside the matrix units."""


@cache
def tiles_for(head_size: int, group: int, dtype: torch.dtype, override: str | None = None) -> Tiles:
    """The tiles of a call; a block's rows hold whole queries, so that they grow with very large groups.

    override: what VARIABLE holds.
    """
    table = _FLOAT if dtype == torch.float32 else _HALF
    tiles = table[max(32, power_of_two(head_size))]
    if override:
        given = dict(part.split("=") for part in override.split(";"))
        tiles = replace(tiles, **{name: Tile(*map(int, values.split(","))) for name, values in given.items()})
    least = max(16, power_of_two(group))
    forward, query, key = (
        replace(tile, rows=max(tile.rows, least)) for tile in (tiles.forward, tiles.query, tiles.key)
    )
    # The lists are made for the forward kernel's blocks; one of the other kernel must not lie in two of them.
    if (forward.rows // group) % (query.rows // group):
        query = replace(query, rows=forward.rows, registers=0)
    return Tiles(forward, query, key)


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(pointers, features, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [*, D] tensor from their first elements' pointers; zeros beyond D.

    Lanes without a row of their own are given another's, which needs no mask; what becomes of them is not used.
    """
    at = pointers[:, None] + features[None, :]
    if BLOCK_D > D:
        return tl.load(at, mask=(features < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit  # type: ignore[untyped-decorator]
def retained_range(
    before_ptr,  # [S + 1] of this (b, h)
    chunk_stable_ptr,  # [chunks] of this (b, h)
    block_size_ptr,  # [blocks] of this (b, h)
    block,
    first_row,
    last_row,
    start_min,
    start_max,
    chunk,
    keys,
    offset,
    prefix,
    window,
    CAPPED: tl.constexpr,
):
    """Of a query block: its first list entry, the end of those that all its queries see, the end of all it may see."""
    if CAPPED:
        begin = 0
        full = tl.load(chunk_stable_ptr + first_row // chunk)
        end = tl.load(block_size_ptr + block)
    else:
        # Entries of earlier documents come first in the list; `start_min` is the block's first document's column. What
        # lies before a prefix's padding is no other document.
        begin = tl.load(before_ptr + tl.where(prefix == 0, tl.minimum(start_min, keys), 0))
        left = tl.minimum(tl.maximum(first_row + offset - window + 1, prefix), keys)
        full = tl.load(before_ptr + left)
        left = tl.minimum(tl.maximum(last_row + offset - window + 1, prefix), keys)
        end = tl.load(before_ptr + left)
        full = tl.maximum(full, begin)
        end = tl.maximum(end, begin)
    if start_min != start_max:
        full = begin
    return begin, full, end


@triton.jit  # type: ignore[untyped-decorator]
def window_range(first_row, last_row, start_min, start_max, offset, window, BLOCK_N: tl.constexpr):
    """Of a query block: the first column of its window, the end, and in tiles of BLOCK_N from there on their number
    and the range of those that all its queries see whole."""
    low = tl.maximum(start_min, first_row + offset - window + 1)
    high = last_row + offset + 1
    tiles = tl.maximum(tl.cdiv(high - low, BLOCK_N), 0)
    full_low = tl.maximum(start_max, last_row + offset - window + 1)
    full_from = tl.minimum(tl.cdiv(tl.maximum(full_low - low, 0), BLOCK_N), tiles)
    full_to = tl.maximum(tl.minimum((first_row + offset + 1 - low) // BLOCK_N, tiles), full_from)
    return low, high, tiles, full_from, full_to


@triton.jit  # type: ignore[untyped-decorator]
def load_keys(
    k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr
):
    """Keys and values `[BLOCK_N, BLOCK_D]` of the columns of one tile."""
    wide = column.to(tl.int64) if LONG else column
    return load_rows(k_ptr + wide * k_stride_t, features, D, BLOCK_D), load_rows(
        v_ptr + wide * v_stride_t, features, D, BLOCK_D
    )


@triton.jit  # type: ignore[untyped-decorator]
def retained_rows(exit_ptr, column, inside, offset, prefix, window):
    """The interval of query rows that retain each key; empty if not inside."""
    upper = tl.load(exit_ptr + column)
    return enter_row(column, offset, prefix, window), tl.where(inside, upper, 0)


@triton.jit  # type: ignore[untyped-decorator]
def window_rows(end_ptr, column, inside, offset, window, PADDED: tl.constexpr):
    """The interval of query rows that have each key in their window; empty if not inside."""
    lower = column - offset
    upper = lower + window
    if PADDED:
        upper = tl.minimum(upper, tl.load(end_ptr + column))
    return lower, tl.where(inside, upper, 0)
