"""The gradients of the compressed branch, without its output's gradient, gate · d_output, ever being in memory.

A kernel over tiles of queries makes dq. In the kernel for dk and dv a program owns a tile of blocks and, of the queries
that see them, those in one span of tokens; the spans' results are added in order, so that a call gives the same bits
every time. With p the weights times the gate: ds = p (do · v − delta), dq = scale ds k, dk = scale dsᵀ q, dv = pᵀ do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import Layout, power_of_two
from .rows import BASE_2, BLOCK_FIELDS, TILE_QUERIES, lanes_of, load_rows, part_of_tile, store_rows
from .tiles import Tile, constants_of, num_parts, size_constants, tiles_of

PROGRAMS = 2112
"""Of the kernel for dk and dv to aim at, half of which have work: eight for each processor of an H100."""

LEAST_STEPS = 32
"""Tiles of queries in a span: fewer would not pay for its results' way through memory."""

ELEMENTS = 1024
"""Of a block's keys that a program of the sum over spans adds up."""


def attend_blocks_backward(
    q: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    d_output: Tensor,
    gate: Tensor,
    delta: Tensor,
    lse: Tensor,
    layout: Layout,
    block_size: int,
    scale: float,
    *,
    padded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ d_output · gate · output over `attend_blocks`' output.

    Args:
        q, d_output: `[B, T, HQ, D]`, features side by side. pooled_k, pooled_v: `[num_blocks, H, D]`, contiguous.
        gate: `[B, T, HQ]`. delta: fp32 `[B, T, HQ]`, gate · <d_output, output>. lse: as `attend_blocks` returns it.
        layout: its documents lie in one row of the batch, or each has `row_blocks` rows of the table of blocks.
        padded: as in `attend_blocks`.

    Returns:
        dq `[B, T, HQ, D]` in q's dtype, 0 where there is no document; d_pooled_k and d_pooled_v, fp32 `[num_blocks, H,
        D]`.
    """
    heads = pooled_k.shape[1]
    dq = (torch.zeros if padded else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or len(layout.tiles) == 0 or pooled_k.numel() == 0:
        none = torch.zeros(pooled_k.shape, dtype=torch.float32, device=q.device)
        return dq.zero_(), none, none.clone()
    if len(layout.blocks) // layout.row_blocks < q.shape[0]:
        raise ValueError("native_sparse_attention: several rows need a layout with equally many blocks in each")
    rows = torch.empty(q.shape[0] * heads, 3, q.shape[1] * (q.shape[2] // heads), dtype=torch.float32, device=q.device)
    constants = constants_of(q, heads, block_size, tiles_of(q, heads, block_size).compressed_query)
    launch(
        _query_kernel,
        (len(layout.tiles) * num_parts(constants) * heads,),
        (q, pooled_k, pooled_v, d_output, gate, delta.contiguous(), lse, layout.tiles, rows, dq),
        (*q.stride()[:3], *d_output.stride()[:3], *gate.stride(), scale, q.shape[1], heads),
        **constants,
    )
    return dq, *_key_gradients(q, pooled_k, pooled_v, d_output, rows, layout, block_size, scale)


def _key_gradients(
    q: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    d_output: Tensor,
    rows: Tensor,
    layout: Layout,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """d_pooled_k and d_pooled_v; rows: as the kernel for dq writes them."""
    time, query_heads, size = q.shape[1:]
    num_blocks, heads = pooled_k.shape[:2]
    most = layout.row_blocks
    slabs = num_blocks // most
    group, tile = query_heads // heads, tiles_of(q, heads, block_size).compressed_key
    tiles = slabs * -(-most // tile.keys)
    span = span_of(time, tiles * heads, group, tile)
    spans = -(-time // span)
    parts = torch.empty(spans, 2, num_blocks, heads, size, dtype=torch.float32, device=q.device)
    constants = size_constants(q, block_size)
    launch(
        _key_kernel,
        (tiles * heads * spans,),
        (q, pooled_k, pooled_v, d_output, rows, layout.blocks, parts),
        (*q.stride()[:3], *d_output.stride()[:3], scale, time, heads, num_blocks, most, span, spans),
        G=group,
        # Offsets from a tile's first row pass 2**31 elements.
        LONG=max(x.stride(1) * tile.rows + x.stride(2) * group for x in (q, d_output)) + size >= 2**31,
        **constants,
        **tile.options(),
    )
    gradients = torch.empty(2, num_blocks, heads, size, dtype=torch.float32, device=q.device)
    elements = heads * size
    block = min(ELEMENTS, power_of_two(elements))
    launch(
        _sum_kernel,
        (num_blocks, 2 * -(-elements // block)),
        (parts, layout.blocks, gradients),
        (num_blocks, elements, span),
        BS=block_size,
        BLOCK=block,
        num_warps=4,
    )
    return gradients[0], gradients[1]


def span_of(time: int, owners: int, group: int, tile: Tile) -> int:
    """Tokens of a span where so many programs own blocks; a whole number of tiles of queries, mostly."""
    step = max(1, tile.rows // group)
    spans = max(1, -(-PROGRAMS // max(owners, 1)))
    return max(-(-time // (spans * step)), LEAST_STEPS) * step


@triton.jit(do_not_specialize=["time", "heads"])  # type: ignore[untyped-decorator]
def _query_kernel(
    q_ptr,
    pooled_k_ptr,  # [num_blocks, H, D]
    pooled_v_ptr,
    d_output_ptr,
    gate_ptr,  # [B, T, HQ]
    delta_ptr,  # [B, T, HQ] contiguous, as the next one
    lse_ptr,
    tiles_ptr,
    rows_ptr,  # [B·H, 3, T·G], written: log-sum-exps, gates, deltas over gates
    dq_ptr,  # [B, T, HQ, D]
    q_stride_b,
    q_stride_t,
    q_stride_h,
    do_stride_b,
    do_stride_t,
    do_stride_h,
    gate_stride_b,
    gate_stride_t,
    gate_stride_h,
    scale,
    time,
    heads,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GP
    PARTS: tl.constexpr = TILE_QUERIES // BLOCK_Q
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = program % heads
    part = program // heads
    batch, first, queries_end, position, base, _ = part_of_tile(tiles_ptr, part // PARTS, part % PARTS, BLOCK_Q)
    if first >= queries_end:
        return
    query, member, valid = lanes_of(queries_end - first, G, GP, BLOCK_M)
    token = first.to(tl.int64) + query
    group_member = head.to(tl.int64) * G + member
    q = load_rows(q_ptr + batch * q_stride_b + token * q_stride_t + group_member * q_stride_h, D, BLOCK_D)
    d_output_ptr += batch * do_stride_b
    d_output = load_rows(d_output_ptr + token * do_stride_t + group_member * do_stride_h, D, BLOCK_D)
    out_row = (batch * time + token) * heads * G + group_member
    gate_ptr += batch * gate_stride_b
    gate = tl.load(gate_ptr + token * gate_stride_t + group_member * gate_stride_h).to(tl.float32)
    # Without its gate, which is then a factor of the whole row.
    delta = tl.load(delta_ptr + out_row) / tl.where(gate == 0.0, float("inf"), gate)
    lse = tl.load(lse_ptr + out_row)
    at_row = rows_ptr + (batch * heads + head) * 3 * time * G + token * G + member
    tl.store(at_row, lse, mask=valid)
    tl.store(at_row + time * G, gate, mask=valid)
    tl.store(at_row + time * G * 2, delta, mask=valid)
    pooled_k_ptr += (base * heads + head) * D
    pooled_v_ptr += (base * heads + head) * D
    seen = (position + query + 1) // BS
    all_seen = (position + 1) // BS
    end = (position + queries_end - first) // BS
    scale2 = scale * BASE_2
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        block = at + tl.arange(0, BLOCK_N)
        row = tl.minimum(block, end - 1) * heads * D
        k = load_rows(pooled_k_ptr + row, D, BLOCK_D)
        v = load_rows(pooled_v_ptr + row, D, BLOCK_D)
        weights = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse[:, None])
        if at + BLOCK_N > all_seen:
            weights = tl.where(block[None, :] < seen[:, None], weights, 0.0)
        d_weights = tl.dot(d_output, tl.trans(v), input_precision=PRECISION)
        d_logits = weights * (d_weights - delta[:, None])
        dq = tl.dot(d_logits.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + out_row * D, dq * (gate * scale)[:, None], valid, D, BLOCK_D)


@triton.jit  # type: ignore[untyped-decorator]
def _tokens_of(blocks_ptr, block, inside, BS: tl.constexpr):
    """The interval of tokens whose queries see each block; empty (0, 0) if it is incomplete or not inside."""
    blocks_ptr += block * BLOCK_FIELDS
    tokens = tl.load(blocks_ptr + 2, mask=inside, other=0)
    number = tl.load(blocks_ptr + 3, mask=inside, other=0)
    zero = tl.load(blocks_ptr + 6, mask=inside, other=0)
    low = tl.load(blocks_ptr + 7, mask=inside, other=0)
    high = tl.load(blocks_ptr + 8, mask=inside, other=0)
    lower = tl.maximum(low, zero + (number + 1) * BS - 1)
    live = (tokens == BS) & (lower < high)
    return tl.where(live, lower, 0), tl.where(live, high, 0)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["time", "heads", "num_blocks", "row_blocks", "span", "spans"]
)
def _key_kernel(
    q_ptr,
    pooled_k_ptr,  # [num_blocks, H, D]
    pooled_v_ptr,
    d_output_ptr,
    rows_ptr,  # [B·H, 3, T·G]
    blocks_ptr,
    parts_ptr,  # [spans, 2, num_blocks, H, D], written: dk and dv of a block from the spans that see it
    q_stride_b,
    q_stride_t,
    q_stride_h,
    do_stride_b,
    do_stride_t,
    do_stride_h,
    scale,
    time,
    heads,
    num_blocks,
    row_blocks,
    span,
    spans,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BS: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Tiles of blocks that see the same queries run side by side, so that these come from memory once. The last span,
    # which all tiles have work in, starts first.
    program = tl.program_id(0)
    tiles = tl.num_programs(0) // (heads * spans)
    tiles_of_slab = tl.cdiv(row_blocks, BLOCK_N)
    part = spans - 1 - program // (tiles * heads)
    head = program // tiles % heads
    slab = program % tiles // tiles_of_slab
    first_block = slab * row_blocks + program % tiles_of_slab * BLOCK_N
    left = row_blocks - program % tiles_of_slab * BLOCK_N
    block = tl.arange(0, BLOCK_N)
    lower, upper = _tokens_of(blocks_ptr, first_block + block, block < left, BS)
    live = upper > lower
    begin = tl.maximum(part * span, tl.min(tl.where(live, lower, time), 0))
    end = tl.minimum(part * span + span, tl.max(upper, 0))
    if begin >= end:
        return
    # From the row that all blocks serve to the row at which the first one's document ends: no mask. What becomes of
    # blocks that are not live is not looked at.
    full_low = tl.max(lower, 0) * G
    full_high = tl.minimum(tl.min(tl.where(live, upper, end), 0), end) * G
    lower *= G
    upper = tl.minimum(upper, end) * G

    batch = tl.load(blocks_ptr + slab * row_blocks * BLOCK_FIELDS).to(tl.int64)
    head = head.to(tl.int64)
    q_ptr += batch * q_stride_b + head * G * q_stride_h
    d_output_ptr += batch * do_stride_b + head * G * do_stride_h
    lse_ptr = rows_ptr + (batch * heads + head) * 3 * time * G
    gate_ptr = lse_ptr + time * G
    delta_ptr = gate_ptr + time * G
    tile = (first_block.to(tl.int64) * heads + head) * D
    row = tl.minimum(block, left - 1) * heads * D
    k = load_rows(pooled_k_ptr + tile + row, D, BLOCK_D)
    v = load_rows(pooled_v_ptr + tile + row, D, BLOCK_D)
    scale2 = scale * BASE_2
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in tl.range(begin * G, end * G, BLOCK_M, num_stages=STAGES):
        lanes = at + tl.arange(0, BLOCK_M)
        # Rows are numbered through tokens and heads, from the first token of this step.
        first = at // G
        lane = tl.minimum(lanes, end * G - 1) - first * G
        token = lane // G
        member = lane % G
        if LONG:
            token = token.to(tl.int64)
            member = member.to(tl.int64)
        q = load_rows(q_ptr + first.to(tl.int64) * q_stride_t + (token * q_stride_t + member * q_stride_h), D, BLOCK_D)
        d_output = load_rows(
            d_output_ptr + first.to(tl.int64) * do_stride_t + (token * do_stride_t + member * do_stride_h), D, BLOCK_D
        )
        inside = lanes < end * G
        lse = tl.load(lse_ptr + lanes, mask=inside, other=0.0)
        gate = tl.load(gate_ptr + lanes, mask=inside, other=0.0)
        # Transposed from the start: a transposed accumulator would be wrong on Hopper with some compilers.
        weights = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2 - lse[None, :])
        if (at < full_low) | (at + BLOCK_M > full_high):
            seen = (lanes[None, :] >= lower[:, None]) & (lanes[None, :] < upper[:, None])
            weights = tl.where(seen, weights, 0.0)
        weights *= gate[None, :]
        dv = tl.dot(weights.to(d_output.dtype), d_output, dv, input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(d_output), input_precision=PRECISION)
        # Not earlier: it would wait in registers, which are all in use.
        delta = tl.load(delta_ptr + lanes, mask=inside, other=0.0)
        d_logits = weights * (d_weights - delta[None, :])
        dk = tl.dot(d_logits.to(q.dtype), q, dk, input_precision=PRECISION)
    # Blocks without a query in this span are written too, which is simpler; nobody reads that.
    at = parts_ptr + part.to(tl.int64) * 2 * num_blocks * heads * D + tile
    store_rows(at + block * heads * D, dk * scale, block < left, D, BLOCK_D)
    at += num_blocks.to(tl.int64) * heads * D
    store_rows(at + block * heads * D, dv, block < left, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_blocks", "elements", "span"])  # type: ignore[untyped-decorator]
def _sum_kernel(
    parts_ptr,  # [spans, 2, num_blocks, H·D]
    blocks_ptr,
    gradients_ptr,  # [2, num_blocks, H·D]
    num_blocks,
    elements,
    span,
    BS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    which = tl.program_id(1) % 2
    element = tl.program_id(1) // 2 * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    lower, upper = _tokens_of(blocks_ptr, block, True, BS)
    at = (which.to(tl.int64) * num_blocks + block) * elements + element
    stride = num_blocks.to(tl.int64) * 2 * elements
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(lower // span, tl.cdiv(upper, span)):
        total += tl.load(parts_ptr + part * stride + at, mask=inside, other=0.0)
    tl.store(gradients_ptr + at, total, mask=inside)
