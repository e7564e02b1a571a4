"""Which query rows retain each key: the interval from the row whose window it has left to the row that has lost it."""

import triton
import triton.language as tl

from .eviction import NEVER

INTEGERS = ["heads", "time", "keys", "offset", "prefix", "window", "sinks", "chunk"]


@triton.jit  # type: ignore[untyped-decorator]
def enter_row(column, offset, prefix, window):
    """The first query row that has the key outside its window; keys of the prefix have left every window."""
    return tl.where(column < prefix, 0, tl.maximum(column - offset + window, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _ranking(
    score_ptr,
    column,
    exists,
    start,
    row,
    head,
    stride_b,
    stride_s,
    stride_h,
    prefix,
    sinks,
    HAS_SCORE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """What keys compete by: higher first; −1 for keys that are not kept."""
    # A positive float orders like its bits; a sink ranks above infinity.
    ranking = tl.full([SCAN], -1, tl.int32)
    if HAS_SCORE:
        at = score_ptr + row * stride_b + head * stride_h + column.to(tl.int64) * stride_s
        score = tl.load(at, mask=exists, other=-1.0).to(tl.float32)
        ranking = tl.where(score > 0, score.to(tl.int32, bitcast=True), -1)
    ranking = tl.where((column >= prefix) & (column - start < sinks), 0x7FFFFFFF, ranking)
    return tl.where(exists & (start <= column), ranking, -1)


@triton.jit  # type: ignore[untyped-decorator]
def lifetimes(
    score_ptr,  # [B, S, H] of any strides
    start_ptr,  # [B, S]
    end_ptr,  # [B, S]
    ranking_ptr,  # [B, H, S]
    evicted_ptr,  # [B, H, S]
    column,
    exists,
    row_head,
    stride_b,
    stride_s,
    stride_h,
    heads,
    time,
    keys,
    offset,
    prefix,
    window,
    sinks,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The rows that retain each key, `[enter, leave)`, and whether there are any."""
    row = row_head // heads
    leave = tl.zeros([SCAN], tl.int32) + time
    if PADDED:
        leave = tl.load(end_ptr + row * keys + column, mask=exists, other=0)
    if CAPPED:
        kept = tl.load(ranking_ptr + row_head * keys + column, mask=exists, other=-1) >= 0
        evicted = tl.load(evicted_ptr + row_head * keys + column, mask=exists & kept, other=0)
        # The key that evicts it counts from the row whose window that key has left.
        reached = tl.where(evicted < prefix, 0, evicted - offset + window)
        leave = tl.where(evicted == NEVER, leave, tl.minimum(leave, reached))
    else:
        start = tl.zeros([SCAN], tl.int32)
        if PADDED:
            start = tl.load(start_ptr + row * keys + column, mask=exists, other=0)
        head = row_head % heads
        ranking = _ranking(
            score_ptr, column, exists, start, row, head, stride_b, stride_s, stride_h, prefix, sinks, HAS_SCORE, SCAN
        )
        kept = ranking >= 0
    enter = enter_row(column, offset, prefix, window)
    leave = tl.where(kept, leave, 0)
    return enter, leave, exists & (leave > enter)


@triton.jit(do_not_specialize=INTEGERS)  # type: ignore[untyped-decorator]
def ranking_kernel(
    score_ptr,  # [B, S, H] of any strides
    start_ptr,  # [B, S]
    end_ptr,
    ranking_ptr,  # [B, H, S], written
    evicted_ptr,
    exit_ptr,
    totals_ptr,
    stride_b,
    stride_s,
    stride_h,
    heads,
    time,
    keys,
    offset,
    prefix,
    window,
    sinks,
    chunk,
    PADDED: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    SCAN: tl.constexpr,
):
    row_head = tl.program_id(1).to(tl.int64)
    row = row_head // heads
    column = tl.program_id(0) * SCAN + tl.arange(0, SCAN)
    exists = column < keys
    start = tl.zeros([SCAN], tl.int32)
    if PADDED:
        start = tl.load(start_ptr + row * keys + column, mask=exists, other=0)
    head = row_head % heads
    ranking = _ranking(
        score_ptr, column, exists, start, row, head, stride_b, stride_s, stride_h, prefix, sinks, HAS_SCORE, SCAN
    )
    tl.store(ranking_ptr + row_head * keys + column, ranking, mask=exists)


@triton.jit(do_not_specialize=INTEGERS)  # type: ignore[untyped-decorator]
def lifetime_kernel(
    score_ptr,
    start_ptr,
    end_ptr,
    ranking_ptr,
    evicted_ptr,
    exit_ptr,  # [B, H, S], written
    totals_ptr,  # [B, H, 2, scans], written: retained keys of each program's scan, and parts of their queries
    stride_b,
    stride_s,
    stride_h,
    heads,
    time,
    keys,
    offset,
    prefix,
    window,
    sinks,
    chunk,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    SCAN: tl.constexpr,
):
    row_head = tl.program_id(1).to(tl.int64)
    scan = tl.program_id(0)
    scans = tl.num_programs(0)
    column = scan * SCAN + tl.arange(0, SCAN)
    exists = column < keys
    enter, leave, retained = lifetimes(
        score_ptr,
        start_ptr,
        end_ptr,
        ranking_ptr,
        evicted_ptr,
        column,
        exists,
        row_head,
        stride_b,
        stride_s,
        stride_h,
        heads,
        time,
        keys,
        offset,
        prefix,
        window,
        sinks,
        CAPPED,
        PADDED,
        HAS_SCORE,
        SCAN,
    )
    tl.store(exit_ptr + row_head * keys + column, leave, mask=exists)
    totals_ptr += row_head * 2 * scans + scan
    tl.store(totals_ptr, tl.sum(retained.to(tl.int32), 0))
    if CAPPED:
        tl.store(totals_ptr + scans, tl.sum(chunks_of(enter, leave, retained, chunk), 0))


@triton.jit  # type: ignore[untyped-decorator]
def chunks_of(enter, leave, retained, chunk):
    """The number of chunks of queries in which each key is retained."""
    return tl.where(retained, (leave - 1) // chunk - enter // chunk + 1, 0)
