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
from .layout import TILE, Layout, power_of_two
from .lists import Lists, lists_by_block
from .pairs import LOG2_E, attend_pairs
from .tiles import Tile, Tiles, load_features
from .unions import Unions, unions_of

PAIR_BYTES = 2**30
"""Of finished pairs that lie in memory at a time, if one key head has not more."""
NOTHING_YET = tl.constexpr(-1e30)  # finite, so that the difference of two of them is a number


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
    near: Tensor,
    gates: Tensor,
    layout: Layout,
    *,
    block_size: int,
    num_selected_blocks: int,
    scale: float,
    tiles: Tiles,
    padded: bool,
    keep: bool,
) -> Selected:
    """The branch, and its gated sum with `compressed` and `near`, the other two `[B, T, HQ, D]`.

    q, compressed, near, gates `[B, T, HQ, 3]`: contiguous. words: of `choose_blocks`.
    padded: whether there may be tokens that belong to no tile. keep: whether a backward pass needs more than the sum.
    """
    (batch, time, query_heads, head_size), heads = q.shape, k.shape[2]
    group = query_heads // heads
    options: dict[str, Any] = {"block_size": block_size, "scale": scale}
    unions = unions_of(
        words, layout, block_size=block_size, queries=tiles.queries(tiles.union, group), limit=tiles.limit
    )
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
            most_slots=max(1, num_selected_blocks - 3),
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
        _attend_unions(
            q, k, v, unions, lists, pairs, compressed, near, gates, made, layout, some, tiles.union, **options
        )
    return made


def _attend_unions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unions: Unions,
    lists: Lists | None,
    pairs: tuple[Tensor, Tensor],
    compressed: Tensor,
    near: Tensor,
    gates: Tensor,
    made: Selected,
    layout: Layout,
    heads: range,
    tile: Tile,
    *,
    block_size: int,
    scale: float,
) -> None:
    (_, time, query_heads, head_size), group = q.shape, q.shape[2] // k.shape[2]
    parts = unions.counts.shape[1]
    slots, counts, most_slots, most_pairs = unions.counts, unions.counts, 0, 0
    if lists is not None:
        slots, counts, most_slots, most_pairs = lists.slots, lists.counts, lists.slots.shape[2], lists.entries.shape[1]
    launch(
        _union_attention_kernel,
        (parts, len(heads)),
        (q, k, v, unions.blocks, unions.counts, slots, counts, *pairs, compressed, near, gates, layout.tiles, *made),
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
        G=group,
        GP=power_of_two(group),
        D=head_size,
        BLOCK_D=max(16, power_of_two(head_size)),
        BS=block_size,
        TILE=TILE,
        FAR=lists is not None,
        KEEP=made.output is not made.mixed,
        PRECISION="ieee" if q.element_size() == 4 else "tf32",
        **tile.options(),
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
    near_ptr,
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
    TILE: tl.constexpr,
    FAR: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GP
    PARTS: tl.constexpr = TILE // BLOCK_Q
    of_launch = tl.program_id(1).to(tl.int64)
    head = of_launch + first_head
    # The last tiles, which have the most blocks, start first.
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    at = tiles_ptr + part // PARTS * 8
    offset = part % PARTS * BLOCK_Q
    row = tl.load(at + 1) + offset
    low = tl.load(at + 2)
    high = tl.load(at + 3)
    if (row >= high) | (row + BLOCK_Q <= low):
        return
    batch = tl.load(at).to(tl.int64)
    position = tl.load(at + 4) + offset
    key = tl.load(at + 5)
    lanes = tl.arange(0, BLOCK_M)
    member = lanes % GP
    lane = lanes // GP
    valid = (member < G) & (row + lane >= low) & (row + lane < high)
    token = batch * time + tl.minimum(tl.maximum(row + lane, low), high - 1)
    features = tl.arange(0, BLOCK_D)
    keys = tl.arange(0, BS)
    out_row = token * query_heads + head * G + tl.minimum(member, G - 1)
    q = load_features(q_ptr + out_row * D, features, D, BLOCK_D)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h

    peak = tl.full([BLOCK_M], NOTHING_YET, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    place = head * tl.num_programs(0) + part
    union_ptr += place * capacity * 2
    # Beyond the last key there may be anything, which a weight of 0 does not make a 0.
    last = tl.load(tiles_ptr + part // PARTS * 8 + 7) - 1
    for n in tl.range(0, tl.load(count_ptr + place), num_stages=STAGES):
        block = tl.load(union_ptr + n * 2)
        bits = tl.load(union_ptr + n * 2 + 1)
        of_key = block * BS + keys
        column = (key + tl.minimum(of_key, last)).to(tl.int64)
        k = load_features(k_ptr + column * k_stride_t, features, D, BLOCK_D)
        v = load_features(v_ptr + column * v_stride_t, features, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if block * BS + BS > position:
            logits = tl.where(of_key[None, :] <= (position + lane)[:, None], logits, -float("inf"))
        # What a row did not choose it sees from infinitely high, which takes no mask of the weights.
        chose = ((bits >> lane) & 1) > 0
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
            pair_row = (of_launch * most_pairs + pair) * G + tl.minimum(member, G - 1)
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
    inside = valid[:, None] & (features < D)[None, :]
    at = out_row[:, None] * D + features[None, :]
    output = output.to(output_ptr.dtype.element_ty)
    if KEEP:
        tl.store(lse_ptr + out_row, lse, mask=valid)
        tl.store(output_ptr + at, output, mask=inside)
    mixed = tl.load(gates_ptr + out_row * 3 + 1).to(tl.float32)[:, None] * output.to(tl.float32)
    compressed = load_features(compressed_ptr + out_row * D, features, D, BLOCK_D)
    mixed += tl.load(gates_ptr + out_row * 3).to(tl.float32)[:, None] * compressed.to(tl.float32)
    near = load_features(near_ptr + out_row * D, features, D, BLOCK_D)
    mixed += tl.load(gates_ptr + out_row * 3 + 2).to(tl.float32)[:, None] * near.to(tl.float32)
    tl.store(mixed_ptr + at, mixed.to(mixed_ptr.dtype.element_ty), mask=inside)
