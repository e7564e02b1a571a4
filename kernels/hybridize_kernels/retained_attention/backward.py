"""The backward kernels: dq by blocks of queries, dk and dv by tiles of keys. All deterministic.

With p = exp(s − lse), dp = do·v and delta = o·do − d lse: ds = p (dp − delta), dq = scale ds k, dk = scale dsᵀ q,
dv = pᵀ do. The kernels over keys compute the transposed products from the start: a transposed accumulator would be
wrong on Hopper with some compilers. A retained key's queries are split into parts, whose sums in fp32 the window's
kernel adds to its own in order, so that every key is written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import INTEGERS, LOG2_E, flags, list_pointers, list_sizes
from .layout import Layout
from .lists import RetainedLists, enter_row
from .tiles import Tiles, load_keys, load_rows, retained_range, retained_rows, window_range, window_rows

PART_PROGRAMS = 16
"""Programs that share the key tiles of one part of the queries; each takes every so-manieth tile."""


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    d_output: Tensor,
    d_log_sum_exp: Tensor | None,
    lists: RetainedLists | None,
    layout: Layout,
    scale: float,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and `[B, S, H]` fp32 ⟨dv, v⟩."""
    batch, time, query_heads, head_size = q.shape
    heads, keys = layout.heads, layout.keys
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    d_gate = torch.empty(batch, keys, heads, dtype=torch.float32, device=q.device)
    delta = torch.empty_like(log_sum_exp)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    do_strides = d_output.stride()[:3]
    constants = flags(lists, layout, q)
    with torch.cuda.device_of(q):
        _query_kernel[(triton.cdiv(time, tiles.query.rows // layout.group), batch * heads)](
            q,
            k,
            v,
            output,
            log_sum_exp,
            d_output,
            log_sum_exp if d_log_sum_exp is None else d_log_sum_exp,
            delta,
            dq,
            *list_pointers(q, lists, layout),
            *strides,
            *do_strides,
            scale,
            *list_sizes(lists, layout),
            *constants,
            HAS_D_LSE=d_log_sum_exp is not None,
            BLOCK_M=tiles.query.rows,
            BLOCK_N=tiles.query.keys,
            STAGES=tiles.query.stages,
            num_warps=tiles.query.warps,
            num_stages=tiles.query.stages,
        )
        tile = tiles.key
        sizes = {
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "STAGES": tile.stages,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        parts = d_gate
        if lists is not None:
            parts = torch.empty(batch, heads, lists.part_rows, 2, head_size, dtype=torch.float32, device=q.device)
            columns = lists.columns if lists.chunk_columns is None else lists.chunk_columns
            longest = columns.shape[-1]
            programs = min(triton.cdiv(longest, tile.keys), PART_PROGRAMS)
            _part_kernel[(programs * triton.cdiv(time, lists.chunk), batch * heads)](
                q,
                k,
                v,
                log_sum_exp,
                d_output,
                delta,
                parts,
                q if layout.query_start is None else layout.query_start,
                columns,
                lists.exit,
                lists.before,
                q if lists.chunk_size is None else lists.chunk_size,
                lists.part_row,
                lists.part_span,
                lists.part_stride,
                *strides,
                *do_strides,
                scale,
                *list_sizes(lists, layout),
                lists.part_rows,
                programs,
                *constants,
                **sizes,
            )
        _key_kernel[(triton.cdiv(keys, tile.keys), batch * heads)](
            q,
            k,
            v,
            log_sum_exp,
            d_output,
            delta,
            parts,
            dk,
            dv,
            d_gate,
            q if layout.key_end is None else layout.key_end,
            *((q, q, q, q) if lists is None else (lists.exit, lists.part_row, lists.part_span, lists.part_stride)),
            *strides,
            *do_strides,
            scale,
            *list_sizes(lists, layout),
            0 if lists is None else lists.part_rows,
            *constants,
            **sizes,
        )
    return dq, dk, dv, d_gate


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
def _query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    output_ptr,  # [B, T, HQ, D] contiguous
    lse_ptr,  # [B, T, HQ]
    d_output_ptr,
    d_lse_ptr,  # [B, T, HQ]
    delta_ptr,  # [B, T, HQ], written
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
    row = first_row + lanes // G
    valid = (lanes < BLOCK_Q * G) & (row < time)
    features = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    row_wide = row.to(tl.int64) if LONG else row

    q_rows = q_ptr + batch * q_stride_b + head * G * q_stride_h + row_wide * q_stride_t + (lanes % G) * q_stride_h
    q = load_rows(q_rows, valid, features, D, BLOCK_D, True)
    do_rows = (
        d_output_ptr + batch * do_stride_b + head * G * do_stride_h + row_wide * do_stride_t + (lanes % G) * do_stride_h
    )
    d_output = load_rows(do_rows, valid, features, D, BLOCK_D, True)
    out_row = (batch * time + row) * heads * G + head * G + lanes % G
    output = load_rows(output_ptr + out_row * D, valid, features, D, BLOCK_D, True)
    delta = tl.sum(output.to(tl.float32) * d_output.to(tl.float32), 1)
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + out_row, mask=valid, other=0.0)
    tl.store(delta_ptr + out_row, delta, mask=valid)
    lse = tl.load(lse_ptr + out_row, mask=valid, other=-float("inf"))
    # A row that sees nothing gets weights of 0.
    lse = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)
    scale2 = scale * 1.4426950408889634

    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    start_min = prefix
    start_max = prefix
    if PADDED:
        key_end_ptr += batch * keys
        start = tl.load(query_start_ptr + batch * time + row, mask=valid, other=0)
        start_min = tl.min(tl.where(valid, start, keys), 0)
        start_max = tl.max(start, 0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if RETAINED:
        exit_ptr += row_head * keys
        chunks = tl.cdiv(time, chunk)
        begin, full, end = retained_range(
            before_ptr + row_head * (keys + 1),
            chunk_stable_ptr + row_head * chunks,
            block_size_ptr + row_head * tl.cdiv(time, BLOCK_Q),
            block,
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
            k, v = load_keys(
                k_ptr, v_ptr, k_stride_t, v_stride_t, column, column, features, D, BLOCK_D, LONG, False
            )
            dq = _query_tile(q, k, v, d_output, lse, delta, dq, scale2, row, column, column, False, PRECISION)
        for at in tl.range(full, end, BLOCK_N, num_stages=STAGES):
            inside = at + columns < end
            column = tl.load(columns_ptr + at + columns, mask=inside, other=0)
            k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, inside, features, D, BLOCK_D, LONG, True)
            lower, upper = retained_rows(exit_ptr, column, inside, offset, prefix, window)
            dq = _query_tile(q, k, v, d_output, lse, delta, dq, scale2, row, lower, upper, True, PRECISION)

    low, high, tiles, full_from, full_to = window_range(
        first_row, last_row, start_min, start_max, offset, window, BLOCK_N
    )
    for at in tl.range(full_from, full_to, num_stages=STAGES):
        column = low + at * BLOCK_N + columns
        k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, column, features, D, BLOCK_D, LONG, False)
        dq = _query_tile(q, k, v, d_output, lse, delta, dq, scale2, row, column, column, False, PRECISION)
    for at in tl.range(0, tiles - (full_to - full_from), num_stages=STAGES):
        column = low + tl.where(at < full_from, at, at + full_to - full_from) * BLOCK_N + columns
        inside = column < high
        k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, inside, features, D, BLOCK_D, LONG, True)
        lower, upper = window_rows(key_end_ptr, column, inside, offset, window, PADDED)
        dq = _query_tile(q, k, v, d_output, lse, delta, dq, scale2, row, lower, upper, True, PRECISION)

    at = dq_ptr + out_row[:, None] * D + features[None, :]
    inside = valid[:, None] & (features < D)[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


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
    query_heads,
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
    """The queries `[first, end)`, at most BLOCK_M // G, in dk (without its factor scale) and dv of a tile of keys."""
    lanes = tl.arange(0, BLOCK_M)
    row = first + lanes // G
    valid = (lanes < BLOCK_M // G * G) & (row < end)
    wide = row.to(tl.int64) if LONG else row
    features = tl.arange(0, BLOCK_D)
    # Whole blocks of a group that fills the tile need no mask.
    PARTIAL: tl.constexpr = MASKED or (BLOCK_M % G != 0)
    q = load_rows(q_ptr + wide * q_stride_t + (lanes % G) * q_stride_h, valid, features, D, BLOCK_D, PARTIAL)
    d_output = load_rows(
        d_output_ptr + wide * do_stride_t + (lanes % G) * do_stride_h, valid, features, D, BLOCK_D, PARTIAL
    )
    at = wide * query_heads + lanes % G
    lse = tl.load(lse_ptr + at, mask=valid, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)
    delta = tl.load(delta_ptr + at, mask=valid, other=0.0)
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
def _all_rows(
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
    query_heads,
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
    for at in tl.range(full_from, full_to, num_stages=STAGES):
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
            query_heads,
            scale2,
            low + at * BLOCK_Q,
            high,
            lower,
            upper,
            G,
            D,
            BLOCK_D,
            LONG,
            PRECISION,
            BLOCK_M,
            False,
        )
    for at in tl.range(0, tiles - (full_to - full_from), num_stages=STAGES):
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
            query_heads,
            scale2,
            low + tl.where(at < full_from, at, at + full_to - full_from) * BLOCK_Q,
            high,
            lower,
            upper,
            G,
            D,
            BLOCK_D,
            LONG,
            PRECISION,
            BLOCK_M,
            True,
        )
    return dk, dv


@triton.jit(do_not_specialize=[*INTEGERS, "part_rows", "programs"])  # type: ignore[untyped-decorator]
def _part_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    d_output_ptr,
    delta_ptr,
    parts_ptr,  # [B·H, part_rows, 2, D], written: dk and dv of a retained key from one part of its queries
    query_start_ptr,
    columns_ptr,
    exit_ptr,
    before_ptr,
    chunk_size_ptr,
    part_row_ptr,
    part_span_ptr,
    part_stride_ptr,
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
    part = tl.program_id(0) // programs
    span = tl.load(part_span_ptr + row_head)
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
        before_ptr += row_head * (keys + 1)
        begin = 0
        if PADDED:
            # Entries of documents that are over come first.
            start = tl.load(query_start_ptr + batch * time + low)
            if (start < keys) & (start > prefix):
                begin = tl.load(before_ptr + start)
        left = tl.minimum(tl.maximum(high + offset - window, prefix), keys)
        end = tl.load(before_ptr + left)
    exit_ptr += row_head * keys
    part_row_ptr += row_head * keys
    stride = tl.load(part_stride_ptr + row_head)
    query_heads = heads * G
    q_ptr += batch * q_stride_b + head * G * q_stride_h
    d_output_ptr += batch * do_stride_b + head * G * do_stride_h
    lse_ptr += batch * time * query_heads + head * G
    delta_ptr += batch * time * query_heads + head * G
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    parts_ptr += row_head * part_rows * 2 * D
    features = tl.arange(0, BLOCK_D)

    for tile in range(begin + tl.program_id(0) % programs * BLOCK_N, end, programs * BLOCK_N):
        entry = tile + tl.arange(0, BLOCK_N)
        inside = entry < end
        column = tl.load(columns_ptr + entry, mask=inside, other=0)
        k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, inside, features, D, BLOCK_D, LONG, True)
        lower, upper = retained_rows(exit_ptr, column, inside, offset, prefix, window)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dk, dv = _all_rows(
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
            query_heads,
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
        target = tl.load(part_row_ptr + column, mask=live, other=0) + (part - lower // span) * stride
        at = parts_ptr + target.to(tl.int64)[:, None] * (2 * D) + features[None, :]
        tl.store(at, dk * scale, mask=live[:, None] & (features < D)[None, :])
        tl.store(at + D, dv, mask=live[:, None] & (features < D)[None, :])


@triton.jit(do_not_specialize=[*INTEGERS, "part_rows"])  # type: ignore[untyped-decorator]
def _key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    d_output_ptr,
    delta_ptr,
    parts_ptr,  # [B·H, part_rows, 2, D]
    dk_ptr,  # [B, S, H, D] contiguous
    dv_ptr,
    d_gate_ptr,  # [B, S, H]
    key_end_ptr,
    exit_ptr,
    part_row_ptr,
    part_span_ptr,
    part_stride_ptr,
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
    part_rows,
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
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < keys
    query_heads = heads * G
    q_ptr += batch * q_stride_b + head * G * q_stride_h
    d_output_ptr += batch * do_stride_b + head * G * do_stride_h
    lse_ptr += batch * time * query_heads + head * G
    delta_ptr += batch * time * query_heads + head * G
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    features = tl.arange(0, BLOCK_D)
    k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, inside, features, D, BLOCK_D, LONG, True)
    if PADDED:
        key_end_ptr += batch * keys
    # Columns of the prefix are in no window.
    in_window = inside & (column >= prefix)
    lower, upper = window_rows(key_end_ptr, column, in_window, offset, window, PADDED)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = _all_rows(
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
        query_heads,
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
        span = tl.load(part_span_ptr + row_head)
        stride = tl.load(part_stride_ptr + row_head)
        retained = inside & (leave > enter)
        number = tl.where(retained, (leave - 1) // span - enter // span + 1, 0)
        target = tl.load(part_row_ptr + row_head * keys + column, mask=retained, other=0)
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
    tl.store(d_gate_ptr + out_row, tl.sum(dv * v.to(tl.float32), 1), mask=inside)
