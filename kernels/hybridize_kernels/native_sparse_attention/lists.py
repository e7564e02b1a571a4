"""Lists by block of the queries that chose it, from the words of `selection`: a counting sort without atomics.

The pairs (query, block) of a key head are numbered block by block, and in a block by query. Such a number is where a
pair's partial result lies; `slots` tells each query the numbers of its pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import TILE, Layout
from .rows import BLOCK_FIELDS, TILE_FIELDS

COLUMNS = 64
"""Blocks that a program looks at together."""


class Lists(NamedTuple):
    """All int32.

    Attributes:
        entries: `[H, most_pairs]` the query (its token among all B·T) of each pair.
        slots: `[H, B·T, most_slots]` the numbers of a query's pairs, in order of block. counts: `[H, B·T]` how many.
        begins, totals: `[H, num_blocks]` the first pair of a block, and how many it has.
        items: `[H, most_items]` the block of a piece of work of up to `entries_per_item` pairs; num_blocks for none.
        item_begins: `[H, num_blocks + 1]` the first of a block's.
    """

    entries: Tensor
    slots: Tensor
    counts: Tensor
    begins: Tensor
    totals: Tensor
    items: Tensor
    item_begins: Tensor


def lists_by_block(
    words: Tensor,
    layout: Layout,
    *,
    batch: int,
    time: int,
    most_slots: int,
    block_size: int,
    entries_per_item: int,
    padded: bool,
) -> Lists:
    """words: `[H, num_tiles, most_blocks]`; most_slots: blocks that one query can have in them; padded: there may be
    tokens that belong to no tile."""
    heads, num_tiles, columns = words.shape
    num_blocks, queries, device = len(layout.blocks), batch * time, words.device

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    before, totals = empty(heads, num_tiles, columns), empty(heads, num_blocks)
    launch(
        _count_kernel,
        (triton.cdiv(num_blocks, COLUMNS), heads),
        (layout.blocks, words, before, totals),
        (num_tiles, num_blocks, columns),
        BS=block_size,
        TILE=TILE,
        BLOCK_T=32,
        BLOCK_C=COLUMNS,
        num_warps=4,
    )
    most_pairs = queries * most_slots
    entries, slots = empty(heads, most_pairs), empty(heads, queries, most_slots)
    num_items = most_pairs // entries_per_item + num_blocks
    begins, items, item_begins = empty(heads, num_blocks), empty(heads, num_items), empty(heads, num_blocks + 1)
    launch(
        _place_kernel,
        (heads,),
        (totals, begins, items, item_begins),
        (num_blocks, num_items),
        ENTRIES=entries_per_item,
        BLOCK=1024,
        num_warps=4,
    )
    counts = empty(heads, queries)
    if padded:  # has no pairs, and no tile that says so
        counts.zero_()
    launch(
        _fill_kernel,
        (num_tiles, heads),
        (layout.tiles, words, before, begins, entries, slots, counts),
        (num_tiles, num_blocks, columns, time, queries, most_slots),
        BS=block_size,
        TILE=TILE,
        BLOCK_C=COLUMNS,
        num_warps=4,
    )
    return Lists(entries, slots, counts, begins, totals, items, item_begins)


@triton.jit  # type: ignore[untyped-decorator]
def ones_of(words):
    """How many bits of int32 numbers are set."""
    bits = words.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return (bits & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "num_columns"])  # type: ignore[untyped-decorator]
def _count_kernel(
    blocks_ptr,  # [num_blocks, 9]
    words_ptr,  # [H, num_tiles, num_columns]
    before_ptr,  # the same, written: pairs of a block in earlier tiles
    totals_ptr,  # [H, num_blocks], written
    num_tiles,
    num_blocks,
    num_columns,
    BS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    index = tl.program_id(0) * BLOCK_C + lane
    inside = index < num_blocks
    at = blocks_ptr + index * BLOCK_FIELDS
    used = tl.load(at + 2, mask=inside, other=0) > 0
    number = tl.load(at + 3, mask=inside, other=0)
    of_zero = tl.load(at + 4, mask=inside, other=0)
    end = tl.where(used, tl.load(at + 5, mask=inside, other=0), 0)
    zero = tl.load(at + 6, mask=inside, other=0)
    low = tl.load(at + 7, mask=inside, other=0)
    # Blocks of one document walk the same tiles at the same time, so that their words lie side by side.
    start = of_zero + tl.maximum(tl.maximum(number - lane, 0) * BS, tl.maximum(low - zero, 0)) // TILE
    steps = tl.max(tl.where(used, end - start, 0), 0)
    step = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_C], tl.int32)
    for first in range(0, steps, BLOCK_T):
        tile = start[None, :] + first + step[:, None]
        valid = (tile < end[None, :]) & used[None, :]
        place = (head * num_tiles + tile) * num_columns + number[None, :]
        count = ones_of(tl.load(words_ptr + place, mask=valid, other=0))
        tl.store(before_ptr + place, total[None, :] + tl.cumsum(count, 0) - count, mask=valid)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + head * num_blocks + index, total, mask=inside)


@triton.jit(do_not_specialize=["num_blocks", "num_items"])  # type: ignore[untyped-decorator]
def _place_kernel(
    totals_ptr,  # [H, num_blocks]
    begins_ptr,  # [H, num_blocks], written
    items_ptr,  # [H, num_items], written
    item_begins_ptr,  # [H, num_blocks + 1], written
    num_blocks,
    num_items,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where each block's pairs and pieces of work begin; a program has a head, of which there are few blocks."""
    head = tl.program_id(0).to(tl.int64)
    totals_ptr += head * num_blocks
    begins_ptr += head * num_blocks
    items_ptr += head * num_items
    item_begins_ptr += head * (num_blocks + 1)
    lane = tl.arange(0, BLOCK)
    pairs, items = 0, 0
    for first in range(0, num_blocks, BLOCK):
        block = first + lane
        inside = block < num_blocks
        total = tl.load(totals_ptr + block, mask=inside, other=0)
        tl.store(begins_ptr + block, pairs + tl.cumsum(total, 0) - total, mask=inside)
        count = (total + ENTRIES - 1) // ENTRIES
        begin = items + tl.cumsum(count, 0) - count
        tl.store(item_begins_ptr + block, begin, mask=inside)
        for n in range(0, tl.max(count, 0)):
            tl.store(items_ptr + begin + n, block, mask=n < count)
        pairs += tl.sum(total, 0)
        items += tl.sum(count, 0)
    tl.store(item_begins_ptr + num_blocks, items)
    for first in range(items, num_items, BLOCK):
        tl.store(items_ptr + first + lane, tl.full([BLOCK], num_blocks, tl.int32), mask=first + lane < num_items)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_tiles", "num_blocks", "num_columns", "time", "queries", "most_slots"]
)
def _fill_kernel(
    tiles_ptr,  # [num_tiles, 8]
    words_ptr,  # [H, num_tiles, num_columns]
    before_ptr,
    begins_ptr,  # [H, num_blocks]
    entries_ptr,  # [H, queries · most_slots], written
    slots_ptr,  # [H, queries, most_slots], written
    counts_ptr,  # [H, queries], written
    num_tiles,
    num_blocks,
    num_columns,
    time,
    queries,
    most_slots,
    BS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    at = tiles_ptr + tile * TILE_FIELDS
    row = tl.load(at + 1)
    low = tl.load(at + 2)
    high = tl.load(at + 3)
    if low >= high:
        return
    query = tl.arange(0, TILE)
    valid = (row + query >= low) & (row + query < high)
    token = tl.load(at) * time + row + query
    end = (tl.load(at + 4) + TILE - 1) // BS + 1
    end = tl.minimum(end, num_columns)
    begins_ptr += head * num_blocks + tl.load(at + 6)
    place = (head * num_tiles + tile) * num_columns
    entries_ptr += head * queries * most_slots
    slots_ptr += head * queries * most_slots
    count = tl.zeros([TILE], tl.int32)
    for first in range(0, end, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        words = tl.load(words_ptr + place + column, mask=column < end, other=0)
        some = words != 0
        if tl.max(some.to(tl.int32), 0) > 0:
            begin = tl.load(begins_ptr + column, mask=some, other=0) + tl.load(
                before_ptr + place + column, mask=some, other=0
            )
            chosen = (words[None, :] >> query[:, None]) & 1
            pair = begin[None, :] + tl.cumsum(chosen, 0) - chosen
            slot = count[:, None] + tl.cumsum(chosen, 1) - chosen
            there = chosen > 0
            tl.store(entries_ptr + pair, tl.broadcast_to(token[:, None], pair.shape), mask=there)
            tl.store(slots_ptr + token[:, None].to(tl.int64) * most_slots + slot, pair, mask=there)
            count += tl.sum(chosen, 1)
    tl.store(counts_ptr + head * queries + token, count, mask=valid)
