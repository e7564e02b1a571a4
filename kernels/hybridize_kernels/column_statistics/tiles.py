"""What both kernels share: tile sizes, the rows of a tile, and the product of two tiles.

A row is a (query, query head of the group) pair, row = query · G + member, so that any G fills a tile and a key is
loaded once for its whole group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

VARIABLE = "HYBRIDIZE_COLUMN_STATISTICS_TILES"
"""Overrides the table: `log_sum_exp=128,128,4,2;statistics=64,128,4,3`, in the order of `Tile`'s fields."""


@dataclass(frozen=True)
class Tile:
    """rows: of (query, query head) pairs; keys; warps and stages of the kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Of the two kernels; slice: columns of D that go into one product."""

    log_sum_exp: Tile
    statistics: Tile
    slice: int


def tiles_for(head_size: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a call. Two programs fit into a multiprocessor, so that one multiplies while the other one sums."""
    padded = max(16, triton.next_power_of_2(head_size))
    if dtype == torch.float32:  # exact products run on the ordinary cores, from registers: in thin slices
        tiles = Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), 16)
    elif padded <= 128:
        tiles = Tiles(Tile(128, 128, 4, 2), Tile(128, 128, 4, 2), padded)
    else:
        tiles = Tiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), padded)
    if override := os.environ.get(VARIABLE):
        for name, values in (part.split("=") for part in override.split(";")):
            tile = Tile(*map(int, values.split(",")))
            tiles = replace(tiles, log_sum_exp=tile) if name == "log_sum_exp" else replace(tiles, statistics=tile)
    return tiles


@triton.jit  # type: ignore[untyped-decorator]
def rows_of(first_row, G: tl.constexpr, ROWS: tl.constexpr):
    """The query of a tile's first row; how many queries further on, and which member of its group, each row is."""
    row = tl.arange(0, ROWS)
    if ROWS % G != 0:  # else tiles begin at a first member, and the offsets are the same for every tile
        row += first_row % G
    return first_row // G, row // G, row % G


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(rows, inside, column, D: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr):
    """`[len(rows), len(column)]` from pointers to rows; zeros beyond D, unless EVEN, and, where MASKED, outside."""
    if MASKED:
        return tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & (column < D)[None, :], other=0.0)
    if not EVEN:
        return tl.load(rows[:, None] + column[None, :], mask=(column < D)[None, :], other=0.0)
    return tl.load(rows[:, None] + column[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def product(
    kept,
    kept_rows,
    kept_inside,
    rows,
    inside,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The program's own tile times the transpose of the tile of `rows`; `kept` is that tile, if one slice is all."""
    column = tl.arange(0, SLICE)
    if SLICE == BLOCK_D:
        other = load_tile(rows, inside, column, D, D == BLOCK_D, MASKED)
        return tl.dot(kept, tl.trans(other), input_precision="ieee")
    result = tl.zeros([kept_rows.shape[0], rows.shape[0]], tl.float32)
    for _ in range(BLOCK_D // SLICE):
        part = load_tile(kept_rows, kept_inside, column, D, False, True)
        other = load_tile(rows, inside, column, D, False, True)
        result = tl.dot(part, tl.trans(other), result, input_precision="ieee")
        column += SLICE
    return result
