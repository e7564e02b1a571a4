"""The log-sum-exp of full causal attention from q and k: a program owns a tile of queries and walks over the keys."""

import triton
import triton.language as tl

from .tiles import load_tile, product, rows_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["time", "heads"])  # type: ignore[untyped-decorator]
def log_sum_exp_kernel(
    q_ptr,  # [B, T, HQ, D]
    k_ptr,  # [B, T, H, D]
    start_ptr,  # [B, T]
    result_ptr,  # [B, T, HQ]
    scale,  # above 0
    time,
    heads,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    # The longest programs first, so that none of them runs alone at the end.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1) % heads
    first_query, offset, member = rows_of(first_row, G, ROWS)
    query = first_query + offset
    inside = query < time
    row = ((batch * time + query) * heads + head) * G + member  # 64 bits: batch is
    k_ptr += (batch * time * heads + head) * D
    q = load_tile(q_ptr + row * D, inside, tl.arange(0, SLICE), D, False, True)
    start = tl.load(start_ptr + batch * time + query, mask=inside, other=time)

    first = tl.min(start, axis=0) // KEYS * KEYS
    last = tl.minimum(time, (first_row + ROWS - 1) // G + 1)
    # Every row sees every key of the tiles between these two.
    full_first = tl.cdiv(tl.max(tl.where(inside, start, 0), axis=0), KEYS) * KEYS
    full_last = tl.maximum(full_first, (first_query + 1) // KEYS * KEYS)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    slope = scale * LOG2_E
    largest, total = _add_keys(
        largest, total, q, q_ptr + row * D, inside, query, start, k_ptr, first, tl.minimum(full_first, last), slope,
        time, heads, D, BLOCK_D, SLICE, KEYS, True,
    )  # fmt: skip
    largest, total = _add_keys(
        largest, total, q, q_ptr + row * D, inside, query, start, k_ptr, full_first, full_last, slope,
        time, heads, D, BLOCK_D, SLICE, KEYS, False,
    )  # fmt: skip
    largest, total = _add_keys(
        largest, total, q, q_ptr + row * D, inside, query, start, k_ptr, full_last, last, slope,
        time, heads, D, BLOCK_D, SLICE, KEYS, True,
    )  # fmt: skip
    # The largest key adds 1 to the total, so only a row that sees nothing has 0.
    result = tl.where(total > 0, slope * largest + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    tl.store(result_ptr + row, result * LN_2, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_keys(
    largest,
    total,
    q,
    q_rows,
    inside,
    query,
    start,
    k_ptr,
    first,
    last,
    slope,
    time,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the keys from first, a multiple of KEYS, to last; where MASKED, row i has those from start_i to query_i.

    largest is that of q·k, not yet scaled, so that scaling costs nothing: it is part of the subtraction.
    """
    offset = tl.arange(0, KEYS)
    for tile in range(tl.cdiv(tl.maximum(last - first, 0), KEYS)):
        first_key = first + tile * KEYS
        key = first_key + offset
        k_rows = k_ptr + first_key.to(tl.int64) * heads * D + offset * heads * D
        logit = product(q, q_rows, inside, k_rows, key < time, D, BLOCK_D, SLICE, MASKED)
        if MASKED:
            seen = (key[None, :] >= start[:, None]) & (key[None, :] <= query[:, None])
            logit = tl.where(seen, logit, -float("inf"))
        larger = tl.maximum(largest, tl.max(logit, axis=1))
        # A row that has seen nothing yet would subtract infinity from itself.
        base = slope * (tl.where(larger == -float("inf"), 0.0, larger) if MASKED else larger)
        total = total * tl.exp2(slope * largest - base) + tl.sum(tl.exp2(slope * logit - base[:, None]), axis=1)
        largest = larger
    return largest, total
