"""What a block of neighbouring queries attends to together: the union of their blocks, and which query chose which.

Neighbours choose much the same blocks of a text (README), so that a block is loaded once for all of them. Where they do
not, and the union is longer than `limit`, only what lies near is listed; the rest is left to the lists by block, `far`
says which.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import FORCED, TILE, Layout, power_of_two
from .rows import TILE_FIELDS


class Unions(NamedTuple):
    """All int32; a part is `queries` neighbouring queries of a tile.

    Attributes:
        blocks: `[H, num_tiles · parts, capacity, 2]` a block's number in its document, and which of the part's queries
            chose it, a bit each. counts: `[H, num_tiles · parts]` how many of them.
        far: `[H, num_tiles, most_blocks]` words of what is not listed; None where nothing can be.
    """

    blocks: Tensor
    counts: Tensor
    far: Tensor | None


def unions_of(words: Tensor, layout: Layout, *, block_size: int, queries: int, limit: int) -> Unions:
    """words: `[H, num_tiles, most_blocks]`; queries: of a part, divides TILE; limit: blocks of a union beside the near
    ones."""
    heads, num_tiles, columns = words.shape
    parts = TILE // queries
    near = FORCED + (queries - 1) // block_size
    split = columns > limit + near
    capacity = limit + near if split else columns
    device = words.device
    blocks = torch.empty(heads, num_tiles * parts, capacity, 2, dtype=torch.int32, device=device)
    counts = torch.empty(heads, num_tiles * parts, dtype=torch.int32, device=device)
    far = torch.empty_like(words) if split else None
    launch(
        _union_kernel,
        (num_tiles, heads),
        (layout.tiles, words, blocks, counts, words if far is None else far),
        (num_tiles, columns, capacity, limit),
        BS=block_size,
        TILE=TILE,
        QUERIES=queries,
        BLOCK_C=power_of_two(columns),
        SPLIT=split,
        num_warps=4,
    )
    return Unions(blocks, counts, far)


@triton.jit(do_not_specialize=["num_tiles", "num_columns", "capacity", "limit"])  # type: ignore[untyped-decorator]
def _union_kernel(
    tiles_ptr,  # [num_tiles, 8]
    words_ptr,  # [H, num_tiles, num_columns]
    blocks_ptr,  # [H, num_tiles · parts, capacity, 2], written
    counts_ptr,  # [H, num_tiles · parts], written
    far_ptr,  # [H, num_tiles, num_columns], written
    num_tiles,
    num_columns,
    capacity,
    limit,
    BS: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr,
):
    PARTS: tl.constexpr = TILE // QUERIES
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    position = tl.load(tiles_ptr + tile * TILE_FIELDS + 4)
    column = tl.arange(0, BLOCK_C)
    inside = column < num_columns
    words = tl.load(words_ptr + (head * num_tiles + tile) * num_columns + column, mask=inside, other=0)
    far = tl.zeros([BLOCK_C], tl.int32)
    for part in range(PARTS):
        mine = words
        if PARTS > 1:
            mine = (words >> (part * QUERIES)) & ((1 << QUERIES) - 1)
        current = (position + part * QUERIES) // BS
        near = (column == 0) | (column >= current - 1)
        listed = mine != 0
        if SPLIT:
            others = listed & (near == 0)
            alone = tl.sum(others.to(tl.int32), 0) > limit
            others = others & alone
            listed = listed & (others == 0)
            far |= tl.where(others, mine << (part * QUERIES), 0)
        place = (head * num_tiles + tile) * PARTS + part
        index = tl.cumsum(listed.to(tl.int32), 0) - 1
        at = blocks_ptr + (place * capacity + index) * 2
        tl.store(at, column, mask=listed)
        tl.store(at + 1, mine, mask=listed)
        tl.store(counts_ptr + place, tl.sum(listed.to(tl.int32), 0))
    if SPLIT:
        tl.store(far_ptr + (head * num_tiles + tile) * num_columns + column, far, mask=inside)
