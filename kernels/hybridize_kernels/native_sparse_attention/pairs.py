"""Attention of queries to one block each, block by block: for queries whose neighbours choose other blocks.

A piece of work is a block, loaded once, and some of the queries that chose it. Each pair's softmax over the block goes
to memory, the output normalised beside its log-sum-exp; `selected` joins the pairs of a query.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import Layout
from .lists import Lists
from .rows import BLOCK_FIELDS, load_rows, store_rows
from .tiles import LOG2_E, Tile, size_constants


def attend_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    layout: Layout,
    output: Tensor,
    log_sum_exp: Tensor,
    *,
    heads: range,
    block_size: int,
    scale: float,
    entries_per_item: int,
    tile: Tile,
) -> None:
    """Writes output `[len(heads), most_pairs, G, D]` and log_sum_exp (base 2) `[len(heads), most_pairs, G]`.

    q `[B, T, HQ, D]`, contiguous; k, v `[B, S, H, D]` with features side by side. All blocks of the lists are complete
    and in the past.
    """
    group = q.shape[2] // k.shape[2]
    launch(
        _pair_kernel,
        (lists.items.shape[1], len(heads)),
        (
            q,
            k,
            v,
            lists.entries,
            lists.begins,
            lists.totals,
            lists.items,
            lists.item_begins,
            layout.blocks,
            output,
            log_sum_exp,
        ),
        (
            *k.stride()[:3],
            *v.stride()[:3],
            scale * LOG2_E,
            heads.start,
            len(layout.blocks),
            lists.items.shape[1],
            lists.entries.shape[1],
            k.shape[2] * group,
        ),
        G=group,
        ENTRIES=entries_per_item,
        **size_constants(q, block_size),
        **tile.options(),
    )


@triton.jit  # type: ignore[untyped-decorator]
def item_of(
    items_ptr, item_begins_ptr, begins_ptr, totals_ptr, head, item, num_items, num_blocks, ENTRIES: tl.constexpr
):
    """The block of a piece of work (num_blocks: none) and its pairs `[first, end)`."""
    block = tl.load(items_ptr + head * num_items + item)
    known = tl.minimum(block, num_blocks - 1)
    number = item - tl.load(item_begins_ptr + head * (num_blocks + 1) + known)
    begin = tl.load(begins_ptr + head * num_blocks + known)
    first = begin + number * ENTRIES
    end = tl.minimum(begin + tl.load(totals_ptr + head * num_blocks + known), first + ENTRIES)
    return block, first, end


@triton.jit(do_not_specialize=["first_head", "num_blocks", "num_items", "most_pairs"])  # type: ignore[untyped-decorator]
def _pair_kernel(
    q_ptr,  # [B·T, HQ, D] contiguous
    k_ptr,
    v_ptr,
    entries_ptr,  # [H, most_pairs]
    begins_ptr,  # [H, num_blocks]
    totals_ptr,  # [H, num_blocks]
    items_ptr,  # [H, num_items]
    item_begins_ptr,  # [H, num_blocks + 1]
    blocks_ptr,  # [num_blocks, 9]
    output_ptr,  # [heads of this launch, most_pairs, G, D], written
    lse_ptr,  # [heads of this launch, most_pairs, G], written
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    scale2,
    first_head,
    num_blocks,
    num_items,
    most_pairs,
    query_heads,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    of_launch = tl.program_id(1).to(tl.int64)
    head = of_launch + first_head
    block, first, end = item_of(
        items_ptr, item_begins_ptr, begins_ptr, totals_ptr, head, tl.program_id(0), num_items, num_blocks, ENTRIES
    )
    if block >= num_blocks:
        return
    batch = tl.load(blocks_ptr + block * BLOCK_FIELDS).to(tl.int64)
    column = (tl.load(blocks_ptr + block * BLOCK_FIELDS + 1) + tl.arange(0, BS)).to(tl.int64)
    lanes = tl.arange(0, BLOCK_M)
    member = lanes % G
    k = load_rows(k_ptr + batch * k_stride_b + head * k_stride_h + column * k_stride_t, D, BLOCK_D)
    v = load_rows(v_ptr + batch * v_stride_b + head * v_stride_h + column * v_stride_t, D, BLOCK_D)
    entries_ptr += head * most_pairs
    q_ptr += (head * G + member) * D
    for at in tl.range(first, end, BLOCK_Q, num_stages=STAGES):
        pair = at + lanes // G
        query = tl.load(entries_ptr + tl.minimum(pair, end - 1)).to(tl.int64)
        q = load_rows(q_ptr + query * query_heads * D, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        peak = tl.max(logits, 1) * scale2
        weights = tl.math.exp2(logits * scale2 - peak[:, None])
        total = tl.sum(weights, 1)
        output = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) * (1.0 / total)[:, None]
        valid = (pair < end) & (lanes < BLOCK_Q * G)
        place = (of_launch * most_pairs + pair) * G + member
        tl.store(lse_ptr + place, peak + tl.math.log2(total), mask=valid)
        store_rows(output_ptr + place * D, output, valid, D, BLOCK_D)
