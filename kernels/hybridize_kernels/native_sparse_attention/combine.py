"""Where the branches' gradients begin and end: what each row needs before, the sums of their dq, dk and dv after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import Layout, power_of_two
from .lists import Lists
from .rows import BLOCK_FIELDS

ROW_ELEMENTS = 4096
"""Of a program over rows."""


def gate_gradients(
    d_output: Tensor, outputs: tuple[Tensor, Tensor, Tensor], gates: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the branches' backward passes begin with.

    Args:
        d_output, outputs: `[B, T, HQ, D]`, contiguous; of the compressed, the selected and the window branch.
        gates: `[B, T, HQ, 3]`. log_sum_exp: `[B, T, HQ]`, of the selected branch, in base 2.

    Returns:
        d gates `[B, T, HQ, 3]`; of the compressed branch gate · ⟨do, output⟩ `[B, T, HQ]`, fp32; of the selected branch
        log-sum-exp and ⟨do, output⟩ `[B, T, HQ, 2]`, fp32, side by side to be loaded as one; and the gradients of the
        selected and the window branch's outputs, in the type of do.
    """
    d_gates = torch.empty_like(gates)
    d_selected, d_window = torch.empty_like(d_output), torch.empty_like(d_output)
    delta, pairs = (d_output.new_empty(d_output.shape[:3] + more, dtype=torch.float32) for more in ((), (2,)))
    rows, head_size = d_output.numel() // d_output.shape[3], d_output.shape[3]
    padded = power_of_two(head_size)
    launch(
        _gate_kernel,
        (triton.cdiv(rows, ROW_ELEMENTS // padded),),
        (d_output, *outputs, gates, log_sum_exp, d_gates, delta, pairs, d_selected, d_window),
        (rows,),
        D=head_size,
        BLOCK_D=padded,
        ROWS=ROW_ELEMENTS // padded,
        num_warps=4,
    )
    return d_gates, delta, pairs, d_selected, d_window


def query_gradient(
    dq_pairs: Tensor, lists: Lists, dq_compressed: Tensor, dq_window: Tensor, dq: Tensor, *, heads: range
) -> None:
    """Writes dq `[B, T, HQ, D]` of these heads: the sum over a query's pairs, and of the other two branches."""
    (batch, time, query_heads, head_size), group = dq.shape, dq_pairs.shape[2]
    padded, members = power_of_two(head_size), power_of_two(group)
    queries = max(1, ROW_ELEMENTS // (padded * members))
    launch(
        _query_sum_kernel,
        (triton.cdiv(batch * time, queries), len(heads)),
        (dq_pairs, lists.slots, lists.counts, dq_compressed, dq_window, dq),
        (batch * time, heads.start, query_heads, lists.slots.shape[2], dq_pairs.shape[1]),
        G=group,
        GP=members,
        D=head_size,
        BLOCK_D=padded,
        QUERIES=queries,
        STAGES=3,
        num_warps=4,
    )


def key_gradients(
    d_items: Tensor,
    lists: Lists,
    layout: Layout,
    pooled: Sequence[Tensor] | None,
    pooling: tuple[Tensor, Tensor] | None,
    window: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    *,
    heads: range,
    block_size: int,
) -> None:
    """Writes dk and dv `[B, S, H, D]` of these heads: the sums over a block's pieces of work, of the window branch's,
    and of what comes through `pooled`, the gradients of pooled keys and values `[num_blocks, H, D]`, fp32, if they are
    made
    of k and v: by weights pooling `[BS, H, D]`, or as the mean.

    window: dk and dv of the window branch, contiguous as `gradients`.
    """
    dk = gradients[0]
    _, keys, num_heads, head_size = dk.shape
    padded = power_of_two(head_size)
    of_blocks = window if pooled is None else pooled
    weights = window if pooling is None else pooling
    launch(
        _key_sum_kernel,
        (len(layout.blocks), len(heads)),
        (d_items, lists.item_begins, layout.blocks, *of_blocks, *weights, *window, *gradients),
        (keys, num_heads, heads.start, len(layout.blocks), d_items.shape[1]),
        D=head_size,
        BLOCK_D=padded,
        BS=block_size,
        POOLED=pooled is not None,
        WEIGHTED=pooling is not None,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _gate_kernel(
    d_output_ptr,  # [rows, D]
    compressed_ptr,
    selected_ptr,
    window_ptr,
    gates_ptr,  # [rows, 3]
    lse_ptr,  # [rows]
    d_gates_ptr,  # [rows, 3], written
    delta_ptr,  # [rows], written
    pairs_ptr,  # [rows, 2], written
    d_selected_ptr,  # [rows, D], written
    d_window_ptr,  # [rows, D], written
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    is_row = row < rows
    inside = is_row[:, None] & (features < D)[None, :]
    at = row[:, None] * D + features[None, :]
    d_output = tl.load(d_output_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for branch in tl.static_range(3):
        output_ptr = compressed_ptr
        if branch == 1:
            output_ptr = selected_ptr
        if branch == 2:
            output_ptr = window_ptr
        output = tl.load(output_ptr + at, mask=inside, other=0.0).to(tl.float32)
        product = tl.sum(output * d_output, 1)
        gate = tl.load(gates_ptr + row * 3 + branch, mask=is_row, other=0.0).to(tl.float32)
        tl.store(d_gates_ptr + row * 3 + branch, product.to(d_gates_ptr.dtype.element_ty), mask=is_row)
        if branch == 0:
            tl.store(delta_ptr + row, gate * product, mask=is_row)
        else:
            gated = (gate[:, None] * d_output).to(d_selected_ptr.dtype.element_ty)
            if branch == 1:
                # Of what was rounded: the difference to do·v may be far smaller than either.
                lse = tl.load(lse_ptr + row, mask=is_row, other=0.0)
                tl.store(pairs_ptr + row * 2, lse, mask=is_row)
                tl.store(pairs_ptr + row * 2 + 1, tl.sum(output * gated.to(tl.float32), 1), mask=is_row)
                tl.store(d_selected_ptr + at, gated, mask=inside)
            else:
                tl.store(d_window_ptr + at, gated, mask=inside)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["queries", "first_head", "most_slots", "most_pairs"]
)
def _query_sum_kernel(
    pairs_ptr,  # [heads of this launch, most_pairs, G, D]
    slots_ptr,  # [H, queries, most_slots]
    counts_ptr,  # [H, queries]
    compressed_ptr,  # [queries, HQ, D]
    window_ptr,
    dq_ptr,  # [queries, HQ, D], written
    queries,
    first_head,
    query_heads,
    most_slots,
    most_pairs,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    of_launch = tl.program_id(1).to(tl.int64)
    head = of_launch + first_head
    lanes = tl.arange(0, QUERIES * GP)
    member = lanes % GP
    query = tl.program_id(0).to(tl.int64) * QUERIES + lanes // GP
    valid = (query < queries) & (member < G)
    features = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (features < D)[None, :]
    at = (query * query_heads + head * G + member)[:, None] * D + features[None, :]
    total = tl.load(compressed_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(window_ptr + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(counts_ptr + head * queries + query, mask=valid, other=0)
    slots_ptr += (head * queries + query) * most_slots
    for slot in tl.range(0, tl.max(count, 0), num_stages=STAGES):
        there = slot < count
        pair = tl.load(slots_ptr + slot, mask=there, other=0)
        row = (of_launch * most_pairs + pair) * G + member
        some = there[:, None] & (features < D)[None, :]
        total += tl.load(pairs_ptr + row[:, None] * D + features[None, :], mask=some, other=0.0).to(tl.float32)
    tl.store(dq_ptr + at, total.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["keys", "first_head", "num_blocks", "num_items"]
)
def _key_sum_kernel(
    d_items_ptr,  # [heads of this launch, num_items, 2, BS, D]
    item_begins_ptr,  # [H, num_blocks + 1]
    blocks_ptr,  # [num_blocks, 9]
    pooled_k_ptr,  # [num_blocks, H, D]
    pooled_v_ptr,
    weights_k_ptr,  # [BS, H, D]
    weights_v_ptr,
    window_k_ptr,  # [B, S, H, D]
    window_v_ptr,
    dk_ptr,  # [B, S, H, D], written
    dv_ptr,
    keys,
    heads,
    first_head,
    num_blocks,
    num_items,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BS: tl.constexpr,
    POOLED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    block = tl.program_id(0)
    of_launch = tl.program_id(1).to(tl.int64)
    head = of_launch + first_head
    at = blocks_ptr + block * BLOCK_FIELDS
    num_keys = tl.load(at + 2)
    if num_keys == 0:
        return
    key = tl.arange(0, BS)
    features = tl.arange(0, BLOCK_D)
    within = (features < D)[None, :]
    token = tl.load(at).to(tl.int64) * keys + tl.load(at + 1) + key
    row = (token * heads + head)[:, None] * D + features[None, :]
    inside = (key < num_keys)[:, None] & within
    begins = item_begins_ptr + head * (num_blocks + 1) + block
    begin = tl.load(begins)
    end = tl.load(begins + 1)
    for of_value in tl.static_range(2):
        window_ptr = window_v_ptr if of_value else window_k_ptr
        pooled_ptr = pooled_v_ptr if of_value else pooled_k_ptr
        weights_ptr = weights_v_ptr if of_value else weights_k_ptr
        d_ptr = dv_ptr if of_value else dk_ptr
        total = tl.load(window_ptr + row, mask=inside, other=0.0).to(tl.float32)
        for item in range(begin, end):
            part = ((of_launch * num_items + item) * 2 + of_value) * BS + key
            total += tl.load(d_items_ptr + part[:, None] * D + features[None, :], mask=inside, other=0.0)
        if POOLED:
            of_block = (block.to(tl.int64) * heads + head) * D + features
            complete = (features < D) & (num_keys == BS)
            pooled = tl.load(pooled_ptr + of_block, mask=complete, other=0.0)[None, :]
            if WEIGHTED:
                weight = (key.to(tl.int64) * heads + head)[:, None] * D + features[None, :]
                total += pooled * tl.load(weights_ptr + weight, mask=inside, other=0.0).to(tl.float32)
            else:
                total += pooled * (1.0 / BS)
        tl.store(d_ptr + row, total.to(d_ptr.dtype.element_ty), mask=inside)
