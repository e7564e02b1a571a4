"""The kernel for dq: a block of queries over the keys that the forward kernel visits, in the same order.

It also writes what the kernels over keys need of a row: its log-sum-exp in base 2, and delta = o·do − d lse.
"""

import triton
import triton.language as tl

from .forward import INTEGERS
from .tiles import load_keys, load_rows, retained_range, retained_rows, window_range, window_rows


@triton.jit  # type: ignore[untyped-decorator]
def _query_tile(
    q, k, v, d_output, lse, delta, dq, scale2, row, lower, upper, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """One tile of keys in dq (without its factor scale)."""
    weights = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse[:, None])
    if MASKED:
        seen = (row[:, None] >= lower[None, :]) & (row[:, None] < upper[None, :])
        weights = tl.where(seen, weights, 0.0)
    d_weights = tl.dot(d_output, tl.trans(v), input_precision=PRECISION)
    d_logits = weights * (d_weights - delta[:, None])
    return tl.dot(d_logits.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=INTEGERS)  # type: ignore[untyped-decorator]
def query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    output_ptr,  # [B, T, HQ, D] contiguous
    lse_ptr,  # [B, T, HQ]
    d_output_ptr,
    d_lse_ptr,  # [B, T, HQ]
    rows_ptr,  # [2, B·H, T, G], written: the log-sum-exp in base 2, and delta
    dq_ptr,  # [B, T, HQ, D] contiguous
    query_start_ptr,
    key_end_ptr,
    columns_ptr,
    exit_ptr,
    before_ptr,
    chunk_stable_ptr,
    block_size_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    do_stride_b,
    do_stride_t,
    do_stride_h,
    scale,
    time,
    keys,
    heads,
    offset,
    prefix,
    window,
    chunk,
    width,
    list_block,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RETAINED: tl.constexpr,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    block = tl.program_id(0)
    row_head = tl.program_id(1).to(tl.int64)
    batch = row_head // heads
    head = row_head % heads
    first_row = block * BLOCK_Q
    last_row = tl.minimum(first_row + BLOCK_Q, time) - 1
    lanes = tl.arange(0, BLOCK_M)
    valid = (lanes < BLOCK_Q * G) & (first_row + lanes // G < time)
    row = tl.minimum(first_row + lanes // G, last_row)
    features = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    row_wide = row.to(tl.int64) if LONG else row
    member = (lanes % G).to(tl.int64) if LONG else lanes % G

    q_rows = q_ptr + batch * q_stride_b + head * G * q_stride_h + row_wide * q_stride_t + member * q_stride_h
    q = load_rows(q_rows, features, D, BLOCK_D)
    do_rows = (
        d_output_ptr + batch * do_stride_b + head * G * do_stride_h + row_wide * do_stride_t + member * do_stride_h
    )
    d_output = load_rows(do_rows, features, D, BLOCK_D)
    out_row = (batch * time + row) * heads * G + head * G + lanes % G
    output = load_rows(output_ptr + out_row * D, features, D, BLOCK_D)
    delta = tl.sum(output.to(tl.float32) * d_output.to(tl.float32), 1)
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + out_row)
    lse = tl.load(lse_ptr + out_row)
    # A row that sees nothing has no part in any gradient, whatever is asked of it: its weights are 0.
    blind = lse == -float("inf")
    delta = tl.where(blind, 0.0, delta)
    lse = tl.where(blind, float("inf"), lse * 1.4426950408889634)
    rows_ptr += (row_head * time + first_row) * G
    tl.store(rows_ptr + lanes, lse, mask=valid)
    tl.store(rows_ptr + tl.num_programs(1).to(tl.int64) * time * G + lanes, delta, mask=valid)
    scale2 = scale * 1.4426950408889634

    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    start_min = prefix
    start_max = prefix
    if PADDED:
        key_end_ptr += batch * keys
        start = tl.load(query_start_ptr + batch * time + row)
        start_min = tl.min(start, 0)
        start_max = tl.max(start, 0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if RETAINED:
        exit_ptr += row_head * keys
        chunks = tl.cdiv(time, chunk)
        begin, full, end = retained_range(
            before_ptr + row_head * (keys + 1),
            chunk_stable_ptr + row_head * chunks,
            block_size_ptr + row_head * tl.cdiv(time, list_block),
            first_row // list_block,
            first_row,
            last_row,
            start_min,
            start_max,
            chunk,
            keys,
            offset,
            prefix,
            window,
            CAPPED,
        )
        if CAPPED:
            columns_ptr += (row_head * chunks + first_row // chunk) * width
        else:
            columns_ptr += row_head * keys
        full = begin + (full - begin) // BLOCK_N * BLOCK_N
        for at in tl.range(begin, full, BLOCK_N, num_stages=STAGES):
            column = tl.load(columns_ptr + at + columns)
            k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
            dq = _query_tile(q, k, v, d_output, lse, delta, dq, scale2, row, column, column, False, PRECISION)
        # Not pipelined: that costs more to start than these few tiles gain, and keeps registers from the others.
        for at in tl.range(full, end, BLOCK_N, num_stages=1):
            column = tl.load(columns_ptr + tl.minimum(at + columns, end - 1))
            k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
            lower, upper = retained_rows(exit_ptr, column, at + columns < end, offset, prefix, window)
            dq = _query_tile(q, k, v, d_output, lse, delta, dq, scale2, row, lower, upper, True, PRECISION)

    low, high, tiles, full_from, full_to = window_range(
        first_row, last_row, start_min, start_max, offset, window, BLOCK_N
    )
    for at in tl.range(full_from, full_to, num_stages=STAGES):
        column = low + at * BLOCK_N + columns
        k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
        dq = _query_tile(q, k, v, d_output, lse, delta, dq, scale2, row, column, column, False, PRECISION)
    for at in tl.range(0, tiles - (full_to - full_from), num_stages=STAGES):
        column = low + tl.where(at < full_from, at, at + full_to - full_from) * BLOCK_N + columns
        inside = column < high
        column = tl.minimum(column, high - 1)
        k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
        lower, upper = window_rows(key_end_ptr, column, inside, offset, window, PADDED)
        dq = _query_tile(q, k, v, d_output, lse, delta, dq, scale2, row, lower, upper, True, PRECISION)

    at = dq_ptr + out_row[:, None] * D + features[None, :]
    inside = valid[:, None] & (features < D)[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)
