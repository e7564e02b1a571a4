"""The sums from rows and keys: a program owns a tile of keys and walks over the far queries."""

import triton
import triton.language as tl

from ..column_statistics.tiles import load_tile, product, rows_of

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_LOGIT = tl.constexpr(64.0)
"""In base 2, where a sigmoid is 1 in fp32, and its exponential still finite."""


@triton.jit(do_not_specialize=["window", "time", "heads", "split_rows"])  # type: ignore[untyped-decorator]
def sums_kernel(
    q_ptr,  # [B, T, HQ, D]
    k_ptr,  # [B, T, H, D]
    v_ptr,  # [B, T, H, D]
    d_output_ptr,  # [B, T, HQ, D]
    log_sum_exp_ptr,  # [B, H, T, G], in base 2, +inf of rows that see nothing
    delta_ptr,  # [B, H, T, G]
    exit_ptr,  # [B, H, T]
    end_ptr,  # [B, T]
    result_ptr,  # [splits, B, T, H]
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
    HIDDEN: tl.constexpr,
    ON_LOGIT: tl.constexpr,
):
    first_key = tl.program_id(0) * KEYS
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64) // heads
    head = tl.program_id(2) % heads
    key = first_key + tl.arange(0, KEYS)
    inside = key < time
    q_ptr += (batch * time * heads + head) * G * D
    d_output_ptr += (batch * time * heads + head) * G * D
    k_rows = k_ptr + ((batch * time + key) * heads + head) * D
    v_rows = v_ptr + ((batch * time + key) * heads + head) * D
    log_sum_exp_ptr += (batch * heads + head) * time * G
    delta_ptr += (batch * heads + head) * time * G
    k = load_tile(k_rows, inside, tl.arange(0, SLICE), D, False, True)
    v = load_tile(v_rows, inside, tl.arange(0, SLICE), D, False, True)
    end = tl.load(end_ptr + batch * time + key, mask=inside, other=0)
    leave = tl.minimum(tl.load(exit_ptr + (batch * heads + head) * time + key, mask=inside, other=0), end)
    # Where hidden pairs do not count, nothing is asked of queries to which no key of the tile is shown.
    reach = end if HIDDEN else tl.where(leave > key + window, leave, 0)

    split_first = split * split_rows
    split_last = split_first + split_rows
    first = tl.maximum((first_key + window) * G // ROWS * ROWS, split_first)
    last = tl.minimum(tl.max(reach, axis=0) * G, split_last)
    # Every query of the tiles between these two is far from every key, and of the text of each.
    full_first = tl.maximum(tl.cdiv((first_key + KEYS - 1 + window) * G, ROWS) * ROWS, split_first)
    full_last = tl.minimum(tl.min(tl.where(inside, end, time), axis=0) * G // ROWS * ROWS, split_last)
    full_last = tl.maximum(full_first, tl.minimum(full_last, tl.cdiv(last, ROWS) * ROWS))
    total = tl.zeros([KEYS], tl.float32)
    slope = scale * LOG2_E
    # From the last query backwards: programs of neighbouring keys then read the same queries at about the same time.
    total = _add_queries(
        total, k, v, k_rows, v_rows, inside, key + window, leave, end, q_ptr, d_output_ptr, log_sum_exp_ptr, delta_ptr,
        full_last, last, slope, time, heads, D, G, BLOCK_D, SLICE, ROWS, True, HIDDEN, ON_LOGIT,
    )  # fmt: skip
    total = _add_queries(
        total, k, v, k_rows, v_rows, inside, key + window, leave, end, q_ptr, d_output_ptr, log_sum_exp_ptr, delta_ptr,
        full_first, full_last, slope, time, heads, D, G, BLOCK_D, SLICE, ROWS, False, HIDDEN, ON_LOGIT,
    )  # fmt: skip
    total = _add_queries(
        total, k, v, k_rows, v_rows, inside, key + window, leave, end, q_ptr, d_output_ptr, log_sum_exp_ptr, delta_ptr,
        first, tl.minimum(full_first, last), slope, time, heads, D, G, BLOCK_D, SLICE, ROWS, True, HIDDEN, ON_LOGIT,
    )  # fmt: skip
    target = ((split * (tl.num_programs(2) // heads) + batch) * time + key) * heads + head
    tl.store(result_ptr + target, total, mask=inside)


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
    log_sum_exp_ptr,
    delta_ptr,
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
    HIDDEN: tl.constexpr,
    ON_LOGIT: tl.constexpr,
):
    """Add rows from first, a multiple of ROWS, to last; where MASKED, key j has the queries from far_j to end_j."""
    num_tiles = tl.cdiv(tl.maximum(last - first, 0), ROWS)
    for tile in range(num_tiles):
        first_row = first + (num_tiles - 1 - tile) * ROWS
        first_query, offset, member = rows_of(first_row, G, ROWS)
        query = first_query + offset
        row = first_row + tl.arange(0, ROWS)
        there = query < time
        if MASKED:
            log_sum_exp = tl.load(log_sum_exp_ptr + row, mask=there, other=float("inf"))
        else:
            log_sum_exp = tl.load(log_sum_exp_ptr + row)
        # Inside a tile 32 bits are enough; its beginning may lie beyond 2**31.
        start = first_query.to(tl.int64) * heads * G * D
        q_rows = q_ptr + start + (offset * heads * G + member) * D
        d_output_rows = d_output_ptr + start + (offset * heads * G + member) * D
        # Keys are the rows of the products, so that no accumulator is ever transposed.
        s = slope * product(k, k_rows, inside, q_rows, there, D, BLOCK_D, SLICE, MASKED) - log_sum_exp[None, :]
        moved = product(v, v_rows, inside, d_output_rows, there, D, BLOCK_D, SLICE, MASKED)
        if ON_LOGIT:
            if MASKED:
                delta = tl.load(delta_ptr + row, mask=there, other=0.0)
            else:
                delta = tl.load(delta_ptr + row)
            moved -= delta[None, :]
        shown = query[None, :] < leave[:, None]
        weight = tl.exp2(tl.minimum(s, LARGEST_LOGIT) if HIDDEN else s)
        if HIDDEN:
            weight = weight / (1.0 + tl.where(shown, 0.0, weight))
            if MASKED:
                weight = tl.where((query[None, :] >= far[:, None]) & (query[None, :] < end[:, None]), weight, 0.0)
        else:
            if MASKED:
                shown &= query[None, :] >= far[:, None]
            weight = tl.where(shown, weight, 0.0)
        total += tl.sum(weight * moved, axis=1)
    return total
