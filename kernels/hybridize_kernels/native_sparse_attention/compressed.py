"""The compressed branch: attention of queries over the complete blocks' keys and values, and the blocks' scores.

Query i sees block c of its document if c < (position + 1) // block_size. There are few blocks to a query, so that a
program's loop is short: one loop, with a mask where some query does not see all of a tile, and no other for the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import TILE, Layout
from .rows import NOTHING_YET, TILE_QUERIES, lanes_of, load_rows, part_of_tile, store_rows
from .tiles import LOG2_E, constants_of, num_parts, tiles_of


def attend_blocks(
    q: Tensor, pooled_k: Tensor, pooled_v: Tensor, layout: Layout, block_size: int, scale: float, *, padded: bool = True
) -> tuple[Tensor, Tensor]:
    """Softmax attention over complete blocks.

    Args:
        q: `[B, T, HQ, D]`, features side by side. pooled_k, pooled_v: `[num_blocks, H, D]`, contiguous.
        padded: False promises that every token of q is a document's, so that nothing needs zeros first.

    Returns:
        The output `[B, T, HQ, D]` in q's dtype, 0 where there is no block or no document; and fp32 `[B, T, HQ]`
        log2 Σ_c 2^(logit · log2 e), the log-sum-exp in base 2, +inf there.
    """
    batch, time, query_heads, _ = q.shape
    heads = pooled_k.shape[1]
    output = (torch.zeros if padded else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, time, query_heads, dtype=torch.float32, device=q.device)
    if padded:
        lse.fill_(float("inf"))
    if output.numel() == 0 or len(layout.tiles) == 0:
        return output, lse
    constants = constants_of(q, heads, block_size, tiles_of(q, heads, block_size).compressed)
    launch(
        _forward_kernel,
        (len(layout.tiles) * num_parts(constants) * heads,),
        (q, pooled_k, pooled_v, layout.tiles, output, lse),
        (*q.stride()[:3], scale * LOG2_E, time, heads),
        **constants,
    )
    return output, lse


def block_scores(
    q: Tensor,
    pooled_k: Tensor,
    lse: Tensor,
    layout: Layout,
    block_size: int,
    scale: float,
    first_tile: int,
    num_tiles: int,
) -> Tensor:
    """fp32 `[H, num_tiles, 32, most_blocks]`: Σ over the heads of a group of the probabilities of each block.

    Entry (h, t, i, c) is of query i of tile first_tile + t and block c of its document. Blocks that the query sees have
    their score and others of the same tile of blocks 0; the rest, and queries that are no document's, are not written.

    lse: fp32 `[B, T, HQ]`, as `attend_blocks` returns it.
    """
    heads = pooled_k.shape[1]
    scores = torch.empty(heads, num_tiles, TILE, layout.most_blocks, dtype=torch.float32, device=q.device)
    if scores.numel() == 0 or q.numel() == 0:
        return scores
    constants = constants_of(q, heads, block_size, tiles_of(q, heads, block_size).scores)
    launch(
        _scores_kernel,
        (num_tiles * num_parts(constants) * heads,),
        (q, pooled_k, lse, layout.tiles, scores),
        (*q.stride()[:3], scale * LOG2_E, q.shape[1], heads, first_tile, num_tiles, layout.most_blocks),
        **constants,
    )
    return scores


@triton.jit(do_not_specialize=["time", "heads"])  # type: ignore[untyped-decorator]
def _forward_kernel(
    q_ptr,
    pooled_k_ptr,  # [num_blocks, H, D]
    pooled_v_ptr,
    tiles_ptr,
    output_ptr,  # [B, T, HQ, D]
    lse_ptr,  # [B, T, HQ]
    q_stride_b,
    q_stride_t,
    q_stride_h,
    scale,  # in base 2
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
    # The last tiles, which see the most blocks, start first, so that the end is not ragged.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = program % heads
    part = program // heads
    batch, first, queries_end, position, base, _ = part_of_tile(tiles_ptr, part // PARTS, part % PARTS, BLOCK_Q)
    if first >= queries_end:
        return
    query, member, valid = lanes_of(queries_end - first, G, GP, BLOCK_M)
    q_ptr += batch * q_stride_b + first.to(tl.int64) * q_stride_t + head.to(tl.int64) * G * q_stride_h
    q = load_rows(q_ptr + query.to(tl.int64) * q_stride_t + member.to(tl.int64) * q_stride_h, D, BLOCK_D)
    pooled_k_ptr += (base * heads + head) * D
    pooled_v_ptr += (base * heads + head) * D
    seen = (position + query + 1) // BS
    all_seen = (position + 1) // BS
    end = (position + queries_end - first) // BS
    maximum = tl.full([BLOCK_M], NOTHING_YET, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        block = at + tl.arange(0, BLOCK_N)
        # Hidden blocks repeat one that is seen: a weight of 0 times what never was written might be NaN.
        row = tl.minimum(block, end - 1) * heads * D
        k = load_rows(pooled_k_ptr + row, D, BLOCK_D)
        v = load_rows(pooled_v_ptr + row, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if at + BLOCK_N > all_seen:
            logits = tl.where(block[None, :] < seen[:, None], logits, -float("inf"))
        higher = tl.maximum(maximum, tl.max(logits, 1) * scale)
        weights = tl.math.exp2(logits * scale - higher[:, None])
        shrink = tl.math.exp2(maximum - higher)
        total = total * shrink + tl.sum(weights, 1)
        output = tl.dot(weights.to(v.dtype), v, output * shrink[:, None], input_precision=PRECISION)
        maximum = higher
    blind = total == 0.0
    output = output / tl.where(blind, 1.0, total)[:, None]
    lse = tl.where(blind, float("inf"), maximum + tl.math.log2(tl.where(blind, 1.0, total)))
    out_row = ((batch * time + first + query) * heads + head) * G + member
    store_rows(output_ptr + out_row * D, output, valid, D, BLOCK_D)
    tl.store(lse_ptr + out_row, lse, mask=valid)


@triton.jit(do_not_specialize=["time", "heads", "first_tile", "num_tiles"])  # type: ignore[untyped-decorator]
def _scores_kernel(
    q_ptr,
    pooled_k_ptr,  # [num_blocks, H, D]
    lse_ptr,  # [B, T, HQ]
    tiles_ptr,
    scores_ptr,  # [H, num_tiles, 32, most_blocks]
    q_stride_b,
    q_stride_t,
    q_stride_h,
    scale,  # in base 2
    time,
    heads,
    first_tile,
    num_tiles,
    most_blocks,
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
    tile = part // PARTS
    batch, first, queries_end, position, base, row = part_of_tile(tiles_ptr, first_tile + tile, part % PARTS, BLOCK_Q)
    if first >= queries_end:
        return
    query, member, valid = lanes_of(queries_end - first, G, GP, BLOCK_M)
    q_ptr += batch * q_stride_b + first.to(tl.int64) * q_stride_t + head.to(tl.int64) * G * q_stride_h
    q = load_rows(q_ptr + query.to(tl.int64) * q_stride_t + member.to(tl.int64) * q_stride_h, D, BLOCK_D)
    out_row = ((batch * time + first + query) * heads + head) * G + member
    lse = tl.load(lse_ptr + out_row, mask=valid, other=float("inf"))
    pooled_k_ptr += (base * heads + head) * D
    scores_ptr += ((head.to(tl.int64) * num_tiles + tile) * TILE_QUERIES + row) * most_blocks
    queries = tl.arange(0, BLOCK_Q)
    seen = (position + queries + 1) // BS
    end = (position + queries_end - first) // BS
    for at in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        block = at + tl.arange(0, BLOCK_N)
        k = load_rows(pooled_k_ptr + tl.minimum(block, end - 1) * heads * D, D, BLOCK_D)
        # Blocks along the first side: a thread of the matrix units then has most of a group's heads to itself.
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights = tl.math.exp2(logits * scale - lse[None, :])
        score = tl.sum(tl.reshape(weights, [BLOCK_N, BLOCK_Q, GP]), 2)
        score = tl.where(block[:, None] < seen[None, :], score, 0.0)
        there = (block < most_blocks)[:, None] & (queries < queries_end - first)[None, :]
        tl.store(scores_ptr + queries[None, :] * most_blocks + block[:, None], score, mask=there)
