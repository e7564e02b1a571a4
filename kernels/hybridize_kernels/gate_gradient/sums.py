"""The sums from rows and keys: a program owns a tile of keys and walks over the far queries, one head at a time."""

import triton
import triton.language as tl

from ..column_statistics.tiles import load_tile, product

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_LOGIT = tl.constexpr(-62.0)
"""In base 2; a weight is as large at least, so that the product of two denominators and its reciprocal are finite."""

INTEGERS = ["window", "time", "heads", "sinks", "split_queries"]


@triton.jit(do_not_specialize=INTEGERS)  # type: ignore[untyped-decorator]
def sums_kernel(
    q_ptr,  # [B, T, HQ, D], of any strides, as k, v and do
    k_ptr,  # [B, T, H, D]
    v_ptr,  # [B, T, H, D]
    d_output_ptr,  # [B, T, HQ, D]
    rows_ptr,  # [2, B·H, T, G]: log-sum-exps in base 2, +inf of rows that see nothing, and deltas
    exit_ptr,  # [B, H, T]
    start_ptr,  # [B, T], read where BOUNDED and SCORED
    end_ptr,  # [B, T], read where BOUNDED
    score_ptr,  # [B, T, H], read where SCORED
    result_ptr,  # [splits, B, T, H]
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
    score_stride_b,
    score_stride_t,
    score_stride_h,
    scale,
    window,
    time,
    heads,
    sinks,
    split_queries,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ON_LOGIT: tl.constexpr,
    LARGEST: tl.constexpr,
    BOUNDED: tl.constexpr,
    SCORED: tl.constexpr,
    PAIRED: tl.constexpr,
):
    first_key = tl.program_id(0) * KEYS
    split = tl.program_id(1)
    row_head = tl.program_id(2).to(tl.int64)
    batch = row_head // heads
    head = row_head % heads
    key = first_key + tl.arange(0, KEYS)
    inside = key < time
    q_ptr += batch * q_stride_b + head * G * q_stride_h
    d_output_ptr += batch * do_stride_b + head * G * do_stride_h
    k_rows = k_ptr + batch * k_stride_b + head * k_stride_h + key.to(tl.int64) * k_stride_t
    v_rows = v_ptr + batch * v_stride_b + head * v_stride_h + key.to(tl.int64) * v_stride_t
    rows_ptr += row_head * time * G
    plane = tl.num_programs(2).to(tl.int64) * time * G
    k = load_tile(k_rows, inside, tl.arange(0, SLICE), D, False, True)
    v = load_tile(v_rows, inside, tl.arange(0, SLICE), D, False, True)
    end = tl.where(inside, time, 0)
    if BOUNDED:
        end = tl.load(end_ptr + batch * time + key, mask=inside, other=0)
    leave = tl.minimum(tl.load(exit_ptr + row_head * time + key, mask=inside, other=0), end)
    # Where hidden pairs do not count, nothing is asked of queries to which no key of the tile is shown.
    reach = end if HIDDEN else tl.where(leave > key + window, leave, 0)

    split_first = split * split_queries
    split_last = split_first + split_queries
    first = tl.maximum((first_key + window) // ROWS * ROWS, split_first)
    last = tl.minimum(tl.max(reach, axis=0), split_last)
    # Every query of the tiles between these two is far from every key, and of the text of each.
    full_first = tl.maximum(tl.cdiv(first_key + KEYS - 1 + window, ROWS) * ROWS, split_first)
    full_last = tl.minimum(tl.min(tl.where(inside, end, time), axis=0) // ROWS * ROWS, split_last)
    full_last = tl.maximum(full_first, tl.minimum(full_last, tl.cdiv(last, ROWS) * ROWS))
    total = tl.zeros([KEYS], tl.float32)
    slope = scale * LOG2_E
    # From the last query backwards: programs of neighbouring keys then read the same queries at about the same time.
    total = _add_queries(
        total, k, v, k_rows, v_rows, inside, key + window, leave, end, q_ptr, d_output_ptr, rows_ptr, plane,
        full_last, last, slope, q_stride_t, q_stride_h, do_stride_t, do_stride_h, time,
        D, G, BLOCK_D, SLICE, ROWS, True, HIDDEN, ON_LOGIT, LARGEST, PAIRED,
    )  # fmt: skip
    total = _add_queries(
        total, k, v, k_rows, v_rows, inside, key + window, leave, end, q_ptr, d_output_ptr, rows_ptr, plane,
        full_first, full_last, slope, q_stride_t, q_stride_h, do_stride_t, do_stride_h, time,
        D, G, BLOCK_D, SLICE, ROWS, False, HIDDEN, ON_LOGIT, LARGEST, PAIRED,
    )  # fmt: skip
    total = _add_queries(
        total, k, v, k_rows, v_rows, inside, key + window, leave, end, q_ptr, d_output_ptr, rows_ptr, plane,
        first, tl.minimum(full_first, last), slope, q_stride_t, q_stride_h, do_stride_t, do_stride_h, time,
        D, G, BLOCK_D, SLICE, ROWS, True, HIDDEN, ON_LOGIT, LARGEST, PAIRED,
    )  # fmt: skip
    if SCORED:
        at = batch * score_stride_b + head * score_stride_h + key.to(tl.int64) * score_stride_t
        score = tl.load(score_ptr + at, mask=inside, other=0.0).to(tl.float32)
        position = key
        if BOUNDED:
            position -= tl.load(start_ptr + batch * time + key, mask=inside, other=0)
        total = tl.where((tl.abs(score) < float("inf")) & (position >= sinks), total, 0.0)
    target = ((split * (tl.num_programs(2) // heads) + batch) * time + key) * heads + head
    tl.store(result_ptr + target, total.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_queries(
    total,
    k,
    v,
    k_rows,
    v_rows,
    inside,
    far,
    leave,
    end,
    q_ptr,
    d_output_ptr,
    rows_ptr,
    plane,
    first,
    last,
    slope,
    q_stride_t,
    q_stride_h,
    do_stride_t,
    do_stride_h,
    time,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    HIDDEN: tl.constexpr,
    ON_LOGIT: tl.constexpr,
    LARGEST: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Add queries from first, a multiple of ROWS, to last; where MASKED, key j has those from far_j to end_j."""
    num_tiles = tl.cdiv(tl.maximum(last - first, 0), ROWS) * G
    offset = tl.arange(0, ROWS)
    for tile in range(num_tiles):
        index = num_tiles - 1 - tile
        first_query = first + index // G * ROWS
        member = (index % G).to(tl.int64)
        query = first_query + offset
        there = query < time
        # What depends on the tile is one number; inside it 32 bits are enough, and the same for every tile.
        beginning = first_query.to(tl.int64)
        q_rows = q_ptr + (beginning * q_stride_t + member * q_stride_h) + offset * q_stride_t
        d_output_rows = d_output_ptr + (beginning * do_stride_t + member * do_stride_h) + offset * do_stride_t
        # Both numbers of a row at once: so many that the compiler fetches them ahead, as it does rows of q and do.
        of_row = (beginning * G + member) + tl.minimum(offset, time - 1 - first_query) * G
        log_sum_exp, delta = tl.split(tl.load(rows_ptr + of_row[:, None] + tl.arange(0, 2)[None, :] * plane))
        # Keys are the rows of the products, so that no accumulator is ever transposed.
        logit = slope * product(k, k_rows, inside, q_rows, there, D, BLOCK_D, SLICE, MASKED)
        moved = product(v, v_rows, inside, d_output_rows, there, D, BLOCK_D, SLICE, MASKED)
        if ON_LOGIT:
            moved -= delta[None, :]
        shown = query[None, :] < leave[:, None]
        if MASKED:
            counts = (query[None, :] >= far[:, None]) & (query[None, :] < end[:, None])
            # Of a pair that does not count the logit is anything, and may not reach the one that shares its reciprocal.
            shown &= counts
        if HIDDEN:
            # e^s is 1 / e^−s and sigmoid(s) is 1 / (1 + e^−s), for any s.
            inverse = tl.exp2(tl.minimum(log_sum_exp[None, :] - logit, -LEAST_LOGIT))
            weight = reciprocal(inverse + tl.where(shown, 0.0, 1.0), PAIRED)
            if MASKED:
                weight = tl.where(counts, weight, 0.0)
        else:
            weight = tl.where(shown, tl.exp2(logit - log_sum_exp[None, :]), 0.0)
        if LARGEST:
            total = tl.maximum(total, tl.max(tl.abs(weight * moved), axis=1))
        else:
            total += tl.sum(weight * moved, axis=1)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def reciprocal(x, PAIRED: tl.constexpr):
    """1 / x; PAIRED: x from 2**−62 to 2**62, by PTX, two of a thread's with one reciprocal: 1/a = b / ab.

    The units that make reciprocals and exponentials are what the sums would wait for.
    """
    if PAIRED:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 both; mul.f32 both, $2, $3; rcp.approx.ftz.f32 both, both;"
            " mul.f32 $0, both, $3; mul.f32 $1, both, $2; }",
            "=&f,=&f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return 1.0 / x
