"""The gradient of the selected branch, block by block: dk and dv of a block, and each pair's part of dq.

A piece of work is a block, loaded once, and some of its queries. With p = exp(s − lse), dp = do·v and delta = ⟨do, o⟩:
ds = p (dp − delta), dq = scale ds k, dk = scale dsᵀ q, dv = pᵀ do. The products are computed transposed from the start,
`[keys, rows]`: a transposed accumulator would be wrong on Hopper with some compilers. Nothing is added in an order that
changes: every piece and every pair has a place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import Layout
from .lists import Lists
from .pairs import item_of
from .rows import BASE_2, BLOCK_FIELDS, load_rows
from .tiles import Tile, size_constants


def pair_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_output: Tensor,
    rows: Tensor,
    lists: Lists,
    layout: Layout,
    dq: Tensor,
    d_items: Tensor,
    *,
    heads: range,
    block_size: int,
    scale: float,
    entries_per_item: int,
    tile: Tile,
) -> None:
    """Writes dq `[len(heads), most_pairs, G, D]`, of each pair, and d_items `[len(heads), most_items, 2, BS, D]`, fp32:
    dk and dv of each piece of work.

    q, d_output (of the branch) `[B, T, HQ, D]`, rows (log-sum-exp in base 2, and ⟨do, o⟩) `[B, T, HQ, 2]`: contiguous.
    """
    group = q.shape[2] // k.shape[2]
    launch(
        _pair_gradient_kernel,
        (lists.items.shape[1], len(heads)),
        (
            q,
            k,
            v,
            d_output,
            rows.view(torch.int64),
            lists.entries,
            lists.begins,
            lists.totals,
            lists.items,
            lists.item_begins,
            layout.blocks,
            dq,
            d_items,
        ),
        (
            *k.stride()[:3],
            *v.stride()[:3],
            scale,
            heads.start,
            q.shape[1],
            len(layout.blocks),
            lists.items.shape[1],
            lists.entries.shape[1],
            q.shape[2],
        ),
        G=group,
        ENTRIES=entries_per_item,
        **size_constants(q, block_size),
        **tile.options(),
    )


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["first_head", "time", "num_blocks", "num_items", "most_pairs"]
)
def _pair_gradient_kernel(
    q_ptr,  # [B·T, HQ, D] contiguous
    k_ptr,
    v_ptr,
    d_output_ptr,  # [B·T, HQ, D] contiguous
    rows_ptr,  # [B·T, HQ] pairs of fp32 as one number
    entries_ptr,  # [H, most_pairs]
    begins_ptr,  # [H, num_blocks]
    totals_ptr,  # [H, num_blocks]
    items_ptr,  # [H, num_items]
    item_begins_ptr,  # [H, num_blocks + 1]
    blocks_ptr,  # [num_blocks, 9]
    dq_ptr,  # [heads of this launch, most_pairs, G, D], written
    d_items_ptr,  # [heads of this launch, num_items, 2, BS, D], written
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    scale,
    first_head,
    time,
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
    item = tl.program_id(0)
    block, first, end = item_of(
        items_ptr, item_begins_ptr, begins_ptr, totals_ptr, head, item, num_items, num_blocks, ENTRIES
    )
    if block >= num_blocks:
        return
    at = blocks_ptr + block * BLOCK_FIELDS
    batch = tl.load(at).to(tl.int64)
    num_keys = tl.load(at + 2)
    first_position = tl.load(at + 3) * BS
    zero = batch * time + tl.load(at + 6)
    keys = tl.arange(0, BS)
    column = (tl.load(at + 1) + tl.minimum(keys, num_keys - 1)).to(tl.int64)
    features = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_M)
    member = lanes % G
    k = load_rows(k_ptr + batch * k_stride_b + head * k_stride_h + column * k_stride_t, D, BLOCK_D)
    v = load_rows(v_ptr + batch * v_stride_b + head * v_stride_h + column * v_stride_t, D, BLOCK_D)
    entries_ptr += head * most_pairs
    of_head = head * G + member
    dk = tl.zeros([BS, BLOCK_D], tl.float32)
    dv = tl.zeros([BS, BLOCK_D], tl.float32)
    scale2 = scale * BASE_2
    for start in tl.range(first, end, BLOCK_Q, num_stages=STAGES):
        pair = start + lanes // G
        valid = (pair < end) & (lanes < BLOCK_Q * G)
        query = tl.load(entries_ptr + tl.minimum(pair, end - 1)).to(tl.int64)
        row = query * query_heads + of_head
        q = load_rows(q_ptr + row * D, D, BLOCK_D)
        d_output = load_rows(d_output_ptr + row * D, D, BLOCK_D)
        numbers = tl.load(rows_ptr + row)
        lse = tl.where(valid, (numbers & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), float("inf"))
        delta = (numbers >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scale
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        seen = keys[:, None] <= (query - zero).to(tl.int32)[None, :] - first_position
        logits = tl.where(seen, logits, -float("inf"))
        weights = tl.math.exp2(logits * scale2 - lse[None, :])
        dv = tl.dot(weights.to(d_output.dtype), d_output, dv, input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(d_output), input_precision=PRECISION)
        d_logits = (weights * (d_weights * scale - delta[None, :])).to(q.dtype)
        dk = tl.dot(d_logits, q, dk, input_precision=PRECISION)
        dq = tl.dot(tl.trans(k), d_logits, input_precision=PRECISION)  # [BLOCK_D, BLOCK_M]
        place = (of_launch * most_pairs + pair) * G + member
        tl.store(
            dq_ptr + place[None, :] * D + features[:, None],
            dq.to(dq_ptr.dtype.element_ty),
            mask=valid[None, :] & (features < D)[:, None],
        )
    at = d_items_ptr + ((of_launch * num_items + item) * 2 * BS + keys)[:, None] * D + features[None, :]
    inside = tl.broadcast_to((features < D)[None, :], [BS, BLOCK_D])
    tl.store(at, dk, mask=inside)
    tl.store(at + BS * D, dv, mask=inside)
