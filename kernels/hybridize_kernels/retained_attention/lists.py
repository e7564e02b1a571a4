"""Which query rows retain which keys, as sorted lists of key columns.

Every kept key j serves an interval of query rows, `[enter, exit)`: from the query whose window it has left up to the
query for which it is evicted or its document is over. Keys with an empty interval are in no list. Without a cap one
list a head serves all queries: those rows that have reached an entry keep it. With a cap each chunk of queries has a
list of its own, of at most budget + chunk entries, so that the dead weigh nothing.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eviction import NEVER, eviction_columns
from .layout import Layout, ceil_div, power_of_two

SCAN = 1024


@dataclass(frozen=True)
class RetainedLists:
    """All int32, on the device.

    Attributes:
        exit: `[B, H, S]` row from which a key is not retained; at most its `enter` if it never is.
        columns: `[B, H, S]` columns of all retained keys in order; unwritten beyond their number.
        before: `[B, H, S + 1]` number of retained keys below each column.
        part_row: `[B, H, S]` row of a retained key's first partial gradient; undefined for other keys.
        part_span, part_stride: `[B, H]` query rows of one part, and the distance of a key's parts in `part_row`'s rows.
        part_rows: rows of partial gradients that (b, h) may need at most.
        chunk, block: query rows of a chunk and of a block; the first is a multiple of the second.
        chunk_columns: `[B, H, chunks, budget + chunk]`, first those that serve the whole chunk, then the others in
            order; None without a cap.
        chunk_stable, chunk_size: `[B, H, chunks]` number of the first, and of all.
        block_size: `[B, H, blocks]` entries that some query of a block may see.
    """

    exit: Tensor
    columns: Tensor
    before: Tensor
    part_row: Tensor
    part_span: Tensor
    part_stride: Tensor
    part_rows: int
    chunk: int
    block: int
    chunk_columns: Tensor | None = None
    chunk_stable: Tensor | None = None
    chunk_size: Tensor | None = None
    block_size: Tensor | None = None


def retained_lists(
    score: Tensor | None, layout: Layout, *, sinks: int, budget: int | None, block: int, chunk: int
) -> RetainedLists:
    """The lists for a call.

    Args:
        score: `[B, S, H]`, or None: sinks only.
        sinks, budget: as in retained_attention; budget at least 1.
        block: query rows of a kernel's block. chunk: query rows that share a list; a multiple of block.
    """
    batch, heads, keys = layout.batch, layout.heads, layout.keys
    device = layout.device
    capped = budget is not None and keys > budget

    def new(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=torch.int32, device=device)

    ranking, evicted = new(keys), None
    source = ranking if score is None else score
    strides = (0, 0, 0) if score is None else score.stride()
    start = ranking if layout.key_start is None else layout.key_start
    end = ranking if layout.key_end is None else layout.key_end
    grid = (ceil_div(keys, SCAN), batch * heads)
    flags = {"PADDED": layout.padded, "HAS_SCORE": score is not None, "SCAN": SCAN}
    totals, exits = new(2, grid[0]), new(keys)
    chunks = ceil_div(layout.time, chunk)

    def lifetimes(*, ranking_only: bool) -> None:
        _lifetime_kernel[grid](
            source,
            start,
            end,
            ranking,
            ranking if evicted is None else evicted,
            exits,
            totals,
            *strides,
            heads,
            layout.time,
            keys,
            layout.offset,
            layout.prefix,
            layout.window,
            sinks,
            chunk,
            RANKING_ONLY=ranking_only,
            CAPPED=capped,
            **flags,
            num_warps=4,
        )

    with torch.cuda.device_of(exits):
        if capped:
            assert budget is not None
            lifetimes(ranking_only=True)
            evicted = eviction_columns(ranking, layout.document, budget)
        lifetimes(ranking_only=False)
        columns, before, part_row = new(keys), new(keys + 1), new(keys)
        part_span, part_stride = new(), new()
        part_rows = keys + min(budget, keys) * chunks if capped and budget is not None else 2 * keys
        _list_kernel[grid](
            exits,
            totals,
            columns,
            before,
            part_row,
            part_span,
            part_stride,
            keys,
            layout.offset,
            layout.prefix,
            layout.window,
            chunk,
            chunks,
            part_rows,
            CAPPED=capped,
            SCANS=power_of_two(grid[0]),
            SCAN=SCAN,
            num_warps=4,
        )
        whole = RetainedLists(exits, columns, before, part_row, part_span, part_stride, part_rows, chunk, block)
        if not capped:
            return whole
        assert budget is not None
        width = min(budget + chunk, keys)
        chunk_columns, chunk_stable, chunk_size = new(chunks, width), new(chunks), new(chunks)
        blocks = ceil_div(layout.time, block)
        block_size = new(blocks)
        _chunk_kernel[(chunks, batch * heads)](
            exits,
            columns,
            before,
            chunk_columns,
            chunk_stable,
            chunk_size,
            block_size,
            layout.time,
            keys,
            layout.offset,
            layout.prefix,
            layout.window,
            chunk,
            block,
            blocks,
            width,
            BLOCKS=power_of_two(chunk // block),
            SCAN=256,
            num_warps=4,
        )
    return RetainedLists(
        exits,
        columns,
        before,
        part_row,
        part_span,
        part_stride,
        part_rows,
        chunk,
        block,
        chunk_columns,
        chunk_stable,
        chunk_size,
        block_size,
    )


@triton.jit  # type: ignore[untyped-decorator]
def enter_row(column, offset, prefix, window):
    """The first query row that has the key outside its window; keys of the prefix have left every window."""
    return tl.where(column < prefix, 0, tl.maximum(column - offset + window, 0))


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["heads", "time", "keys", "offset", "prefix", "window", "sinks", "chunk"]
)
def _lifetime_kernel(
    score_ptr,  # [B, S, H] of any strides
    start_ptr,  # [B, S]
    end_ptr,  # [B, S]
    ranking_ptr,  # [B, H, S]
    evicted_ptr,  # [B, H, S]
    exit_ptr,  # [B, H, S]
    totals_ptr,  # [B, H, 2, scans]
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
    RANKING_ONLY: tl.constexpr,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    SCAN: tl.constexpr,
):
    row_head = tl.program_id(1).to(tl.int64)
    row = row_head // heads
    head = row_head % heads
    scan = tl.program_id(0)
    column = scan * SCAN + tl.arange(0, SCAN)
    exists = column < keys
    start = tl.zeros([SCAN], tl.int32)
    end = tl.zeros([SCAN], tl.int32) + time
    if PADDED:
        start = tl.load(start_ptr + row * keys + column, mask=exists, other=0)
        end = tl.load(end_ptr + row * keys + column, mask=exists, other=0)

    if CAPPED and not RANKING_ONLY:
        kept = tl.load(ranking_ptr + row_head * keys + column, mask=exists, other=-1) >= 0
    else:
        # A positive float orders like its bits; a sink ranks above infinity.
        ranking = tl.full([SCAN], -1, tl.int32)
        if HAS_SCORE:
            at = score_ptr + row * stride_b + head * stride_h + column.to(tl.int64) * stride_s
            score = tl.load(at, mask=exists, other=-1.0).to(tl.float32)
            ranking = tl.where(score > 0, score.to(tl.int32, bitcast=True), -1)
        ranking = tl.where((column >= prefix) & (column - start < sinks), 0x7FFFFFFF, ranking)
        ranking = tl.where(exists & (start <= column), ranking, -1)
        kept = ranking >= 0
        if RANKING_ONLY:
            tl.store(ranking_ptr + row_head * keys + column, ranking, mask=exists)

    if not RANKING_ONLY:
        enter = enter_row(column, offset, prefix, window)
        leave = end
        if CAPPED:
            evicted = tl.load(evicted_ptr + row_head * keys + column, mask=exists & kept, other=0)
            # The key that evicts it counts from the row whose window that key has left.
            reached = tl.where(evicted < prefix, 0, evicted - offset + window)
            leave = tl.where(evicted == NEVER, end, tl.minimum(end, reached))
        leave = tl.where(kept, leave, 0)
        admitted = exists & (leave > enter)
        tl.store(exit_ptr + row_head * keys + column, leave, mask=exists)
        scans = tl.num_programs(0)
        totals_ptr += row_head * 2 * scans + scan
        tl.store(totals_ptr, tl.sum(admitted.to(tl.int32), 0))
        parts = tl.where(admitted, (leave - 1) // chunk - enter // chunk + 1, 0)
        tl.store(totals_ptr + scans, tl.sum(parts, 0))


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["keys", "offset", "prefix", "window", "chunk", "chunks", "part_rows"]
)
def _list_kernel(
    exit_ptr,  # [B·H, S]
    totals_ptr,  # [B·H, 2, scans]
    columns_ptr,  # [B·H, S]
    before_ptr,  # [B·H, S + 1]
    part_row_ptr,  # [B·H, S]
    part_span_ptr,  # [B·H]
    part_stride_ptr,  # [B·H]
    keys,
    offset,
    prefix,
    window,
    chunk,
    chunks,
    part_rows,
    CAPPED: tl.constexpr,
    SCANS: tl.constexpr,
    SCAN: tl.constexpr,
):
    row_head = tl.program_id(1).to(tl.int64)
    scan = tl.program_id(0)
    scans = tl.num_programs(0)
    others = tl.arange(0, SCANS)
    totals_ptr += row_head * 2 * scans
    total = tl.load(totals_ptr + others, mask=others < scans, other=0)
    number = tl.sum(total, 0)
    first = tl.sum(tl.where(others < scan, total, 0), 0)

    column = scan * SCAN + tl.arange(0, SCAN)
    exists = column < keys
    leave = tl.load(exit_ptr + row_head * keys + column, mask=exists, other=0)
    enter = enter_row(column, offset, prefix, window)
    admitted = exists & (leave > enter)
    count = admitted.to(tl.int32)
    index = first + tl.cumsum(count, 0) - count
    tl.store(columns_ptr + row_head * keys + index, column, mask=admitted)
    tl.store(before_ptr + row_head * (keys + 1) + column, index, mask=exists)

    if CAPPED:
        span = chunk
        stride = number * 0 + 1
        total = tl.load(totals_ptr + scans + others, mask=others < scans, other=0)
        parts = tl.where(admitted, (leave - 1) // chunk - enter // chunk + 1, 0)
        part_row = tl.sum(tl.where(others < scan, total, 0), 0) + tl.cumsum(parts, 0) - parts
    else:
        # As many parts as there is room for: few keys are split finely, many are parallel enough by themselves.
        splits = tl.minimum(tl.maximum(part_rows // tl.maximum(number, 1), 1), chunks)
        span = (chunks + splits - 1) // splits * chunk
        stride = number
        part_row = enter // span * number + index
    tl.store(part_row_ptr + row_head * keys + column, part_row, mask=admitted)
    if scan == 0:
        tl.store(before_ptr + row_head * (keys + 1) + keys, number)
        tl.store(part_span_ptr + row_head, span)
        tl.store(part_stride_ptr + row_head, stride)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["time", "keys", "offset", "prefix", "window", "chunk", "block", "blocks", "width"]
)
def _chunk_kernel(
    exit_ptr,  # [B·H, S]
    columns_ptr,  # [B·H, S]
    before_ptr,  # [B·H, S + 1]
    chunk_columns_ptr,  # [B·H, chunks, width]
    chunk_stable_ptr,  # [B·H, chunks]
    chunk_size_ptr,  # [B·H, chunks]
    block_size_ptr,  # [B·H, blocks]
    time,
    keys,
    offset,
    prefix,
    window,
    chunk,
    block,
    blocks,
    width,
    BLOCKS: tl.constexpr,
    SCAN: tl.constexpr,
):
    row_head = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0)
    chunks = tl.num_programs(0)
    begin = index * chunk
    end = tl.minimum(begin + chunk, time)
    exit_ptr += row_head * keys
    columns_ptr += row_head * keys
    chunk_columns_ptr += (row_head * chunks + index) * width
    reached = tl.minimum(tl.maximum(end + offset - window, prefix), keys)
    entries = tl.load(before_ptr + row_head * (keys + 1) + tl.maximum(reached, 0))

    stable = 0
    for at in range(0, entries, SCAN):
        entry = at + tl.arange(0, SCAN)
        exists = entry < entries
        column = tl.load(columns_ptr + entry, mask=exists, other=0)
        leave = tl.load(exit_ptr + column, mask=exists, other=0)
        enter = enter_row(column, offset, prefix, window)
        stable += tl.sum((exists & (enter <= begin) & (leave >= end)).to(tl.int32), 0)

    block_of_chunk = tl.arange(0, BLOCKS)
    block_end = begin + (block_of_chunk + 1) * block
    seen = tl.zeros([BLOCKS], tl.int32)
    first_stable = 0
    first_other = stable
    for at in range(0, entries, SCAN):
        entry = at + tl.arange(0, SCAN)
        exists = entry < entries
        column = tl.load(columns_ptr + entry, mask=exists, other=0)
        leave = tl.load(exit_ptr + column, mask=exists, other=0)
        enter = enter_row(column, offset, prefix, window)
        stays = exists & (enter <= begin) & (leave >= end)
        passes = exists & (leave > begin) & (stays == 0)
        number = stays.to(tl.int32)
        tl.store(chunk_columns_ptr + first_stable + tl.cumsum(number, 0) - number, column, mask=stays)
        first_stable += tl.sum(number, 0)
        number = passes.to(tl.int32)
        tl.store(chunk_columns_ptr + first_other + tl.cumsum(number, 0) - number, column, mask=passes)
        first_other += tl.sum(number, 0)
        seen += tl.sum((passes[None, :] & (enter[None, :] < block_end[:, None])).to(tl.int32), 1)
    tl.store(chunk_stable_ptr + row_head * chunks + index, stable)
    tl.store(chunk_size_ptr + row_head * chunks + index, first_other)
    blocks_ptr = block_size_ptr + row_head * blocks + begin // block + block_of_chunk
    within = (block_of_chunk < chunk // block) & (begin // block + block_of_chunk < blocks)
    tl.store(blocks_ptr, stable + seen, mask=within)
