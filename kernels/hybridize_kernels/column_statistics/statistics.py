"""The statistics from q, k and the log-sum-exp: a program owns a tile of keys and walks over the far queries."""

import triton
import triton.language as tl

from .tiles import load_tile, product, rows_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["window", "time", "heads", "split_rows"])  # type: ignore[untyped-decorator]
def statistics_kernel(
    q_ptr,  # [B, T, HQ, D]
    k_ptr,  # [B, T, H, D]
    log_sum_exp_ptr,  # [B, H, T, G], in base 2
    end_ptr,  # [B, T]
    largest_ptr,  # [splits, B, T, H]
    summed_ptr,
    scale,
    window,
    time,
    heads,
    split_rows,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    NEED_SUM: tl.constexpr,
):
    first_key = tl.program_id(0) * KEYS
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64) // heads
    head = tl.program_id(2) % heads
    key = first_key + tl.arange(0, KEYS)
    inside = key < time
    q_ptr += (batch * time * heads + head) * G * D
    k_rows = k_ptr + ((batch * time + key) * heads + head) * D
    log_sum_exp_ptr += (batch * heads + head) * time * G
    k = load_tile(k_rows, inside, tl.arange(0, SLICE), D, False, True)
    end = tl.load(end_ptr + batch * time + key, mask=inside, other=0)

    split_first = split * split_rows
    split_last = split_first + split_rows
    first = tl.maximum((first_key + window) * G // ROWS * ROWS, split_first)
    last = tl.minimum(tl.max(end, axis=0) * G, split_last)
    # Every query of the tiles between these two is far from every key.
    full_first = tl.maximum(tl.cdiv((first_key + KEYS - 1 + window) * G, ROWS) * ROWS, split_first)
    full_last = tl.minimum(tl.min(tl.where(inside, end, time), axis=0) * G // ROWS * ROWS, split_last)
    full_last = tl.maximum(full_first, full_last)
    largest = tl.full([KEYS], -float("inf"), tl.float32)
    summed = tl.zeros([KEYS], tl.float32)
    slope = scale * LOG2_E
    # From the last query backwards: programs of neighbouring keys then read the same queries at about the same time.
    largest, summed = _add_queries(
        largest, summed, k, k_rows, inside, key + window, end, q_ptr, log_sum_exp_ptr, full_last, last, slope,
        time, heads, D, G, BLOCK_D, SLICE, ROWS, True, NEED_SUM,
    )  # fmt: skip
    largest, summed = _add_queries(
        largest, summed, k, k_rows, inside, key + window, end, q_ptr, log_sum_exp_ptr, full_first, full_last, slope,
        time, heads, D, G, BLOCK_D, SLICE, ROWS, False, NEED_SUM,
    )  # fmt: skip
    largest, summed = _add_queries(
        largest, summed, k, k_rows, inside, key + window, end, q_ptr, log_sum_exp_ptr, first,
        tl.minimum(full_first, last), slope, time, heads, D, G, BLOCK_D, SLICE, ROWS, True, NEED_SUM,
    )  # fmt: skip
    target = ((split * (tl.num_programs(2) // heads) + batch) * time + key) * heads + head
    tl.store(largest_ptr + target, largest * LN_2, mask=inside)
    if NEED_SUM:
        tl.store(summed_ptr + target, summed, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_queries(
    largest,
    summed,
    k,
    k_rows,
    inside,
    far,
    end,
    q_ptr,
    log_sum_exp_ptr,
    first,
    last,
    slope,
    time,
    heads,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    NEED_SUM: tl.constexpr,
):
    """Add rows from first, a multiple of ROWS, to last; where MASKED, key j has the queries from far_j to end_j."""
    num_tiles = tl.cdiv(tl.maximum(last - first, 0), ROWS)
    for tile in range(num_tiles):
        first_row = first + (num_tiles - 1 - tile) * ROWS
        first_query, offset, member = rows_of(first_row, G, ROWS)
        query = first_query + offset
        row = first_row + tl.arange(0, ROWS)
        if MASKED:
            log_sum_exp = tl.load(log_sum_exp_ptr + row, mask=query < time, other=0.0)
        else:
            log_sum_exp = tl.load(log_sum_exp_ptr + row)
        # Inside a tile 32 bits are enough; its beginning may lie beyond 2**31.
        q_rows = q_ptr + first_query.to(tl.int64) * heads * G * D + (offset * heads * G + member) * D
        # Keys are the rows of the product, so that no accumulator is ever transposed.
        logit = slope * product(k, k_rows, inside, q_rows, query < time, D, BLOCK_D, SLICE, MASKED)
        log_probability = logit - log_sum_exp[None, :]
        if MASKED:
            counts = (query[None, :] >= far[:, None]) & (query[None, :] < end[:, None])
            log_probability = tl.where(counts, log_probability, -float("inf"))
        largest = tl.maximum(largest, tl.max(log_probability, axis=1))
        if NEED_SUM:
            summed += tl.sum(tl.exp2(log_probability), axis=1)
    return largest, summed
