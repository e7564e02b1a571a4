"""The kernels for dk and dv: of retained keys in parts, and of all keys in the window, which adds the parts."""

import triton
import triton.language as tl

from .forward import INTEGERS
from .key_rows import all_rows
from .lifetimes import enter_row
from .lists import first_part_row, parts_of_queries
from .tiles import load_keys, retained_rows, window_rows


@triton.jit(do_not_specialize=[*INTEGERS, "part_rows", "programs"])  # type: ignore[untyped-decorator]
def part_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_output_ptr,
    rows_ptr,  # [2, B·H, T, G]: log-sum-exps in base 2, +inf of rows that see nothing, and deltas
    parts_ptr,  # [B·H, part_rows, 2, D], written: dk and dv of a retained key from one part of its queries
    query_start_ptr,
    columns_ptr,
    exit_ptr,
    before_ptr,
    chunk_size_ptr,
    part_row_ptr,
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
    part_rows,
    programs,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RETAINED: tl.constexpr,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_head = tl.program_id(1).to(tl.int64)
    batch = row_head // heads
    head = row_head % heads
    # The last part of the queries, which has the most keys, starts first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    part = program // programs
    before_ptr += row_head * (keys + 1)
    span, stride = parts_of_queries(before_ptr, part_rows, chunk, time, keys, CAPPED)
    low = part * span
    if low >= time:
        return
    high = tl.minimum(low + span, time)
    if CAPPED:
        chunks = tl.cdiv(time, chunk)
        columns_ptr += (row_head * chunks + part) * width
        begin = 0
        end = tl.load(chunk_size_ptr + row_head * chunks + part)
    else:
        columns_ptr += row_head * keys
        begin = 0
        if PADDED:
            # Entries of documents that are over come first.
            start = tl.load(query_start_ptr + batch * time + low)
            if (start < keys) & (prefix == 0):
                begin = tl.load(before_ptr + start)
        left = tl.minimum(tl.maximum(high + offset - window, prefix), keys)
        end = tl.load(before_ptr + left)
    exit_ptr += row_head * keys
    part_row_ptr += row_head * keys
    q_ptr += batch * q_stride_b + head * G * q_stride_h
    d_output_ptr += batch * do_stride_b + head * G * do_stride_h
    lse_ptr = rows_ptr + row_head * time * G
    delta_ptr = lse_ptr + tl.num_programs(1).to(tl.int64) * time * G
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    parts_ptr += row_head * part_rows * 2 * D
    features = tl.arange(0, BLOCK_D)

    for tile in range(begin + program % programs * BLOCK_N, end, programs * BLOCK_N):
        entry = tile + tl.arange(0, BLOCK_N)
        inside = entry < end
        column = tl.load(columns_ptr + tl.minimum(entry, end - 1))
        k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
        lower, upper = retained_rows(exit_ptr, column, inside, offset, prefix, window)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dk, dv = all_rows(
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
            scale * 1.4426950408889634,
            low,
            high,
            lower,
            upper,
            inside,
            G,
            D,
            BLOCK_D,
            LONG,
            PRECISION,
            BLOCK_M,
            STAGES,
        )
        live = inside & (upper > low) & (upper > lower)
        target = first_part_row(before_ptr, part_row_ptr, column, live, lower, span, stride, CAPPED)
        target += (part - lower // span) * stride
        at = parts_ptr + target.to(tl.int64)[:, None] * (2 * D) + features[None, :]
        tl.store(at, dk * scale, mask=live[:, None] & (features < D)[None, :])
        tl.store(at + D, dv, mask=live[:, None] & (features < D)[None, :])


@triton.jit(do_not_specialize=[*INTEGERS, "part_rows"])  # type: ignore[untyped-decorator]
def key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_output_ptr,
    rows_ptr,  # [2, B·H, T, G]: as above
    parts_ptr,  # [B·H, part_rows, 2, D]
    dk_ptr,  # [B, S, H, D] contiguous
    dv_ptr,
    score_ptr,  # [B, S, H] of any strides
    d_score_ptr,  # [B, S, H] contiguous
    key_end_ptr,
    exit_ptr,
    before_ptr,
    part_row_ptr,
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
    part_rows,
    score_stride_b,
    score_stride_t,
    score_stride_h,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RETAINED: tl.constexpr,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_head = tl.program_id(1).to(tl.int64)
    batch = row_head // heads
    head = row_head % heads
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < keys
    column = tl.minimum(column, keys - 1)
    q_ptr += batch * q_stride_b + head * G * q_stride_h
    d_output_ptr += batch * do_stride_b + head * G * do_stride_h
    lse_ptr = rows_ptr + row_head * time * G
    delta_ptr = lse_ptr + tl.num_programs(1).to(tl.int64) * time * G
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    features = tl.arange(0, BLOCK_D)
    k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
    if PADDED:
        key_end_ptr += batch * keys
    # Columns of the prefix are in no window.
    in_window = inside & (column >= prefix)
    lower, upper = window_rows(key_end_ptr, column, in_window, offset, window, PADDED)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = all_rows(
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
        scale * 1.4426950408889634,
        0,
        time,
        lower,
        upper,
        in_window,
        G,
        D,
        BLOCK_D,
        LONG,
        PRECISION,
        BLOCK_M,
        STAGES,
    )
    dk *= scale
    if RETAINED:
        enter = enter_row(column, offset, prefix, window)
        leave = tl.load(exit_ptr + row_head * keys + column, mask=inside, other=0)
        before_ptr += row_head * (keys + 1)
        span, stride = parts_of_queries(before_ptr, part_rows, chunk, time, keys, CAPPED)
        retained = inside & (leave > enter)
        number = tl.where(retained, (leave - 1) // span - enter // span + 1, 0)
        part_row_ptr += row_head * keys
        target = first_part_row(before_ptr, part_row_ptr, column, retained, enter, span, stride, CAPPED)
        parts_ptr += row_head * part_rows * 2 * D
        for part in range(0, tl.max(number, 0)):
            at = (target + part * stride).to(tl.int64)[:, None] * (2 * D) + features[None, :]
            there = (part < number)[:, None] & (features < D)[None, :]
            dk += tl.load(parts_ptr + at, mask=there, other=0.0)
            dv += tl.load(parts_ptr + at + D, mask=there, other=0.0)
    out_row = (batch * keys + column) * heads + head
    at = out_row[:, None] * D + features[None, :]
    there = inside[:, None] & (features < D)[None, :]
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=there)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=there)
    if HAS_SCORE:
        at = score_ptr + batch * score_stride_b + head * score_stride_h + column.to(tl.int64) * score_stride_t
        finite = tl.abs(tl.load(at, mask=inside, other=0.0).to(tl.float32)) < float("inf")
        d_score = tl.where(finite, tl.sum(dv * v.to(tl.float32), 1), 0.0)
        tl.store(d_score_ptr + out_row, d_score.to(d_score_ptr.dtype.element_ty), mask=inside)
