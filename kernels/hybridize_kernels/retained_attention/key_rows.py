"""dk and dv of one tile of keys, from the queries that the keys serve.

The products are computed transposed from the start, `[keys, rows]`: a transposed accumulator would be wrong on Hopper
with some compilers.
"""

import triton
import triton.language as tl

from .tiles import load_rows


@triton.jit  # type: ignore[untyped-decorator]
def _rows_tile(
    k,
    v,
    dk,
    dv,
    q_ptr,
    lse_ptr,
    d_output_ptr,
    delta_ptr,
    q_stride_t,
    q_stride_h,
    do_stride_t,
    do_stride_h,
    scale2,
    first,
    end,
    lower,
    upper,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The queries `[first, end)`, at most BLOCK_M // G, in dk (without its factor scale) and dv of a tile of keys.

    lse_ptr and delta_ptr: `[T, G]` of this (b, h), the log-sum-exp in base 2; see `query_gradient`.
    """
    lanes = tl.arange(0, BLOCK_M)
    member = lanes % G
    lane_row = lanes // G
    at = lanes
    # Whole blocks of a group that fills the tile have a row in every lane.
    PARTIAL: tl.constexpr = MASKED or (BLOCK_M % G != 0)
    if PARTIAL:
        valid = (lanes < BLOCK_M // G * G) & (lane_row < end - first)
        lane_row = tl.minimum(lane_row, end - first - 1)
        at = lane_row * G + member
    row = first + lane_row
    if LONG:
        lane_row = lane_row.to(tl.int64)
        member = member.to(tl.int64)
    begin = first.to(tl.int64)
    features = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + begin * q_stride_t + (lane_row * q_stride_t + member * q_stride_h), features, D, BLOCK_D)
    d_output = load_rows(
        d_output_ptr + begin * do_stride_t + (lane_row * do_stride_t + member * do_stride_h), features, D, BLOCK_D
    )
    lse = tl.load(lse_ptr + begin * G + at)
    if PARTIAL:
        lse = tl.where(valid, lse, float("inf"))
    delta = tl.load(delta_ptr + begin * G + at)
    weights = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2 - lse[None, :])
    if MASKED:
        seen = (row[None, :] >= lower[:, None]) & (row[None, :] < upper[:, None])
        weights = tl.where(seen, weights, 0.0)
    dv = tl.dot(weights.to(d_output.dtype), d_output, dv, input_precision=PRECISION)
    d_weights = tl.dot(v, tl.trans(d_output), input_precision=PRECISION)
    d_logits = weights * (d_weights - delta[None, :])
    dk = tl.dot(d_logits.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit  # type: ignore[untyped-decorator]
def all_rows(
    k,
    v,
    dk,
    dv,
    q_ptr,
    lse_ptr,
    d_output_ptr,
    delta_ptr,
    q_stride_t,
    q_stride_h,
    do_stride_t,
    do_stride_h,
    scale2,
    low,
    high,
    lower,
    upper,
    inside,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk and dv of a tile of keys from the rows [low, high), where key j serves [lower_j, upper_j)."""
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    low = tl.maximum(low, tl.min(tl.where(inside, lower, high), 0))
    high = tl.minimum(high, tl.max(tl.where(inside, upper, low), 0))
    tiles = tl.maximum(tl.cdiv(high - low, BLOCK_Q), 0)
    # From the row that all keys serve to the row at which the first one ends: no mask.
    full_low = tl.max(lower, 0)
    full_high = tl.minimum(high, tl.min(upper, 0))
    full_from = tl.minimum(tl.cdiv(tl.maximum(full_low - low, 0), BLOCK_Q), tiles)
    full_to = tl.maximum(tl.minimum(tl.maximum(full_high - low, 0) // BLOCK_Q, tiles), full_from)
    for masked in tl.static_range(2):
        if masked:
            begin = 0
            end = tiles - (full_to - full_from)
        else:
            begin = full_from
            end = full_to
        for at in tl.range(begin, end, num_stages=STAGES):
            tile = at
            if masked:
                tile = tl.where(at < full_from, at, at + full_to - full_from)
            dk, dv = _rows_tile(
                k,
                v,
                dk,
                dv,
                q_ptr,
                lse_ptr,
                d_output_ptr,
                delta_ptr,
                q_stride_t,
                q_stride_h,
                do_stride_t,
                do_stride_h,
                scale2,
                low + tile * BLOCK_Q,
                high,
                lower,
                upper,
                G,
                D,
                BLOCK_D,
                LONG,
                PRECISION,
                BLOCK_M,
                masked,
            )
    return dk, dv
