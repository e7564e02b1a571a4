"""The selected branch, forward, and the gated sum of the three branches, which it ends with.

A program has neighbouring queries of one key head, all query heads of the group, and walks the union of their blocks;
what is not in it comes from the lists by block as finished pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import FORCED, TILE, Layout
from .lists import Lists, lists_by_block
from .pairs import attend_pairs
from .rows import NOTHING_YET, TILE_FIELDS, TILE_QUERIES, lanes_of, load_rows, part_of_tile, store_rows
from .tiles import LOG2_E, constants_of, num_parts, tiles_of
from .unions import Unions, unions_of

PAIR_BYTES = 2**30
"""Of finished pairs that lie in memory at a time, if one key head has not more."""


class Selected(NamedTuple):
    """Attributes:
    output: of the branch. log_sum_exp: `[B, T, HQ]`, base 2, +inf of rows that see nothing. mixed: Σ gate · branch.
    """

    output: Tensor
    log_sum_exp: Tensor
    mixed: Tensor


def head_groups(heads: int, pairs: int, group: int, head_size: int, element_size: int) -> list[range]:
    """Key heads that are done at a time."""
    each = pairs * group * head_size * element_size
    count = max(1, min(heads, PAIR_BYTES // max(each, 1)))
    return [range(first, min(first + count, heads)) for first in range(0, heads, count)]


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    compressed: Tensor,
    window: Tensor,
    gates: Tensor,
    layout: Layout,
    *,
    block_size: int,
    num_selected_blocks: int,
    scale: float,
    padded: bool,
    keep: bool,
) -> Selected:
    """The branch, and its gated sum with `compressed` and `window`, the other two `[B, T, HQ, D]`.

    q, compressed, window, gates `[B, T, HQ, 3]`: contiguous. words: of `choose_blocks`.
    padded: whether there may be tokens that belong to no tile. keep: whether a backward pass needs more than the sum.
    """
    (batch, time, query_heads, head_size), heads = q.shape, k.shape[2]
    group = query_heads // heads
    options: dict[str, Any] = {"block_size": block_size, "scale": scale}
    tiles = tiles_of(q, heads, block_size)
    constants = constants_of(q, heads, block_size, tiles.union)
    unions = unions_of(words, layout, block_size=block_size, queries=TILE // num_parts(constants), limit=tiles.limit)
    mixed = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    made = Selected(torch.empty_like(q) if keep else mixed, lse, mixed)
    if padded:
        for x, nothing in zip(made, (0.0, torch.inf, 0.0), strict=True):
            x.fill_(nothing)
    far, lists = unions.far, None
    if far is None:
        groups = [range(heads)]
    else:
        lists = lists_by_block(
            far,
            layout,
            batch=batch,
            time=time,
            most_slots=max(1, min(num_selected_blocks, layout.most_blocks) - FORCED),
            block_size=block_size,
            entries_per_item=tiles.entries,
            padded=padded,
        )
        groups = head_groups(heads, lists.entries.shape[1], group, head_size, q.element_size())
    pairs = q.new_empty(0), made.log_sum_exp
    if lists is not None:
        shape = (len(groups[0]), lists.entries.shape[1], group)
        pairs = q.new_empty(*shape, head_size), torch.empty(shape, dtype=torch.float32, device=q.device)
    for some in groups:
        if lists is not None:
            entries = tiles.entries
            attend_pairs(
                q, k, v, lists, layout, *pairs, heads=some, entries_per_item=entries, tile=tiles.pairs, **options
            )
        _attend_unions(q, k, v, unions, lists, pairs, compressed, window, gates, made, layout, some, constants, scale)
    return made


def _attend_unions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unions: Unions,
    lists: Lists | None,
    pairs: tuple[Tensor, Tensor],
    compressed: Tensor,
    window: Tensor,
    gates: Tensor,
    made: Selected,
    layout: Layout,
    heads: range,
    constants: dict[str, Any],
    scale: float,
) -> None:
    time, query_heads = q.shape[1:3]
    parts = unions.counts.shape[1]
    slots, counts, most_slots, most_pairs = unions.counts, unions.counts, 0, 0
    if lists is not None:
        slots, counts, most_slots, most_pairs = lists.slots, lists.counts, lists.slots.shape[2], lists.entries.shape[1]
    launch(
        _union_attention_kernel,
        (parts, len(heads)),
        (q, k, v, unions.blocks, unions.counts, slots, counts, *pairs, compressed, window, gates, layout.tiles, *made),
        (
            *k.stride()[:3],
            *v.stride()[:3],
            scale * LOG2_E,
            heads.start,
            time,
            query_heads,
            unions.blocks.shape[2],
            q.shape[0] * time,
            most_slots,
            most_pairs,
        ),
        FAR=lists is not None,
        KEEP=made.output is not made.mixed,
        **constants,
    )


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["first_head", "time", "capacity", "queries", "most_slots", "most_pairs"]
)
def _union_attention_kernel(
    q_ptr,  # [B·T, HQ, D] contiguous
    k_ptr,
    v_ptr,
    union_ptr,  # [H, parts, capacity, 2]
    count_ptr,  # [H, parts]
    slots_ptr,  # [H, B·T, most_slots]
    counts_ptr,  # [H, B·T]
    pair_ptr,  # [heads of this launch, most_pairs, G, D]
    pair_lse_ptr,  # [heads of this launch, most_pairs, G]
    compressed_ptr,  # [B·T, HQ, D]
    window_ptr,
    gates_ptr,  # [B·T, HQ, 3]
    tiles_ptr,  # [num_tiles, 8]
    output_ptr,  # [B·T, HQ, D], written
    lse_ptr,  # [B·T, HQ], written
    mixed_ptr,  # [B·T, HQ, D], written
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    scale2,
    first_head,
    time,
    query_heads,
    capacity,
    queries,
    most_slots,
    most_pairs,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BS: tl.constexpr,
    FAR: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GP
    PARTS: tl.constexpr = TILE_QUERIES // BLOCK_Q
    of_launch = tl.program_id(1).to(tl.int64)
    head = of_launch + first_head
    # The last tiles, which have the most blocks, start first.
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, part_in_tile = part // PARTS, part % PARTS
    batch, first, end, position, _, index = part_of_tile(tiles_ptr, tile, part_in_tile, BLOCK_Q)
    if first >= end:
        return
    query, member, valid = lanes_of(end - first, G, GP, BLOCK_M)
    bit = query + index - part_in_tile * BLOCK_Q
    key = tl.load(tiles_ptr + tile * TILE_FIELDS + 5)
    # Beyond the last key there may be anything, which a weight of 0 does not make a 0.
    last = tl.load(tiles_ptr + tile * TILE_FIELDS + 7) - 1
    token = batch * time + first + query
    keys = tl.arange(0, BS)
    features = tl.arange(0, BLOCK_D)
    out_row = token * query_heads + head * G + member
    q = load_rows(q_ptr + out_row * D, D, BLOCK_D)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h

    peak = tl.full([BLOCK_M], NOTHING_YET, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    place = head * tl.num_programs(0) + part
    union_ptr += place * capacity * 2
    for n in tl.range(0, tl.load(count_ptr + place), num_stages=STAGES):
        block = tl.load(union_ptr + n * 2)
        bits = tl.load(union_ptr + n * 2 + 1)
        of_key = block * BS + keys
        column = (key + tl.minimum(of_key, last)).to(tl.int64)
        k = load_rows(k_ptr + column * k_stride_t, D, BLOCK_D)
        v = load_rows(v_ptr + column * v_stride_t, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if block * BS + BS > position:
            logits = tl.where(of_key[None, :] <= (position + query)[:, None], logits, -float("inf"))
        # What a row did not choose it sees from infinitely high, which takes no mask of the weights.
        chose = ((bits >> bit) & 1) > 0
        higher = tl.where(chose, tl.maximum(peak, tl.max(logits, 1) * scale2), peak)
        weights = tl.math.exp2(logits * scale2 - tl.where(chose, higher, float("inf"))[:, None])
        shrink = tl.math.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        output = tl.dot(weights.to(v.dtype), v, output * shrink[:, None], input_precision=PRECISION)
        peak = higher

    if FAR:
        count = tl.load(counts_ptr + head * queries + token, mask=valid, other=0)
        slots_ptr += (head * queries + token) * most_slots
        for slot in tl.range(0, tl.max(count, 0), num_stages=STAGES):
            there = slot < count
            pair = tl.load(slots_ptr + slot, mask=there, other=0)
            pair_row = (of_launch * most_pairs + pair) * G + member
            pair_lse = tl.load(pair_lse_ptr + pair_row, mask=there, other=-float("inf"))
            part_output = tl.load(
                pair_ptr + pair_row[:, None] * D + features[None, :],
                mask=there[:, None] & (features < D)[None, :],
                other=0.0,
            )
            higher = tl.maximum(peak, pair_lse)
            shrink = tl.math.exp2(peak - higher)
            weight = tl.math.exp2(pair_lse - higher)
            total = total * shrink + weight
            output = output * shrink[:, None] + weight[:, None] * part_output.to(tl.float32)
            peak = higher

    blind = total == 0
    output = output * (1.0 / tl.where(blind, 1.0, total))[:, None]
    lse = tl.where(blind, float("inf"), peak + tl.math.log2(tl.where(blind, 1.0, total)))
    output = output.to(output_ptr.dtype.element_ty)
    if KEEP:
        tl.store(lse_ptr + out_row, lse, mask=valid)
        store_rows(output_ptr + out_row * D, output, valid, D, BLOCK_D)
    mixed = tl.load(gates_ptr + out_row * 3 + 1).to(tl.float32)[:, None] * output.to(tl.float32)
    compressed = load_rows(compressed_ptr + out_row * D, D, BLOCK_D)
    mixed += tl.load(gates_ptr + out_row * 3).to(tl.float32)[:, None] * compressed.to(tl.float32)
    window = load_rows(window_ptr + out_row * D, D, BLOCK_D)
    mixed += tl.load(gates_ptr + out_row * 3 + 2).to(tl.float32)[:, None] * window.to(tl.float32)
    store_rows(mixed_ptr + out_row * D, mixed, valid, D, BLOCK_D)
