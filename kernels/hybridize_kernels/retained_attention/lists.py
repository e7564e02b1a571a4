"""Which query rows retain which keys, as sorted lists of key columns.

Every kept key j serves an interval of query rows, `[enter, exit)`: from the query whose window it has left up to the
query for which it is evicted or its document is over. Keys with an empty interval are in no list. Without a cap one
list a head serves all queries: those rows that have reached an entry keep it. With a cap each chunk of queries has a
list of its own, of at most budget + chunk entries, so that the dead weigh nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from .eviction import eviction_columns
from .layout import Geometry, Vectors, ceil_div, power_of_two
from .lifetimes import INTEGERS, chunks_of, enter_row, lifetime_kernel, lifetimes, ranking_kernel

SCAN = 1024
ALONE = 4096
"""Keys that one program takes in one go; so many at most are one program's work, without a count before."""


class RetainedLists(NamedTuple):
    """All int32, on the device.

    Attributes:
        exit: `[B, H, S]` row from which a key is not retained; at most its `enter` if it never is.
        columns: `[B, H, S]` columns of all retained keys in order; unwritten beyond their number.
        before: `[B, H, S + 1]` number of retained keys below each column.
        part_row: `[B, H, S]` row of a retained key's first partial gradient; undefined for other keys. None without a
            cap, where it follows from `before`; see parts_of_queries.
        chunk_columns: `[B, H, chunks, budget + chunk]`, first those that serve the whole chunk, then the others in
            order; None without a cap.
        chunk_stable, chunk_size: `[B, H, chunks]` number of the first, and of all.
        block_size: `[B, H, blocks]` entries that some query of a block may see.
    """

    exit: Tensor
    columns: Tensor
    before: Tensor
    part_row: Tensor | None = None
    chunk_columns: Tensor | None = None
    chunk_stable: Tensor | None = None
    chunk_size: Tensor | None = None
    block_size: Tensor | None = None

    @property
    def walked(self) -> Tensor:
        """The columns that the kernels walk over: of a chunk, or of all."""
        return self.columns if self.chunk_columns is None else self.chunk_columns


class ListPlan:
    """What the lists of calls with the same geometry have in common.

    Args:
        score_strides: of the scores `[B, S, H]`, or None: sinks only.
        sinks, budget: as in retained_attention; budget at least 1.
        block: query rows of a kernel's block. chunk: query rows that share a list; a multiple of block.

    Attributes:
        cap: most keys that a query retains, None if nothing is ever evicted.
        width: entries of a chunk's list, 0 without a cap.
        part_rows: rows of partial gradients that (b, h) may need at most.
        ranking, lifetime, list, chunk_list: the launches in their order; None where a call needs none.
    """

    def __init__(
        self,
        geometry: Geometry,
        score_strides: tuple[int, ...] | None,
        *,
        sinks: int,
        budget: int | None,
        block: int,
        chunk: int,
    ) -> None:
        self.geometry, self.chunk, self.block = geometry, chunk, block
        batch, time, keys, heads = geometry[:4]
        self.cap = cap = budget if budget is not None and keys > budget else None
        self.chunks, self.blocks = ceil_div(time, chunk), ceil_div(time, block)
        self.width = 0 if cap is None else min(cap + chunk, keys)
        self.part_rows = 2 * keys if cap is None else keys + cap * self.chunks
        alone = keys <= ALONE
        scan = SCAN if keys <= SCAN or not alone else ALONE
        self.scans = ceil_div(keys, scan)
        grid = (self.scans, batch * heads)
        sizes = (heads, time, keys, geometry.offset, geometry.prefix, geometry.window, sinks, chunk)
        numbers = (*(score_strides or (0, 0, 0)), *sizes)
        flags: dict[str, Any] = {
            "PADDED": geometry.padded,
            "HAS_SCORE": score_strides is not None,
            "SCAN": scan,
            "num_warps": 4 if scan == SCAN else 16,
        }
        capped = {**flags, "CAPPED": cap is not None}
        self.ranking = None if cap is None else Launch(ranking_kernel, grid, numbers, flags)
        self.lifetime = None if alone else Launch(lifetime_kernel, grid, numbers, capped)
        self.list = Launch(_list_kernel, grid, numbers, {**capped, "ALONE": alone, "SCANS": power_of_two(self.scans)})
        self.chunk_list = None
        if cap is not None:
            self.chunk_list = Launch(
                _chunk_kernel,
                (self.chunks, batch * heads),
                (
                    time,
                    keys,
                    geometry.offset,
                    geometry.prefix,
                    geometry.window,
                    chunk,
                    block,
                    self.blocks,
                    self.width,
                ),
                {"BLOCKS": power_of_two(chunk // block), "SCAN": 256, "num_warps": 4},
            )


def retained_lists(plan: ListPlan, score: Tensor | None, vectors: Vectors, device: torch.device) -> RetainedLists:
    """The lists of a call; score `[B, S, H]`, or None: sinks only."""
    batch, _, keys, heads = plan.geometry[:4]

    def new(*shape: int) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=torch.int32, device=device)

    exits, columns, before = new(keys), new(keys), new(keys + 1)
    ranking = evicted = totals = part_row = exits
    start = exits if vectors.key_start is None else vectors.key_start
    end = exits if vectors.key_end is None else vectors.key_end
    scores = exits if score is None else score
    if plan.ranking is not None and plan.cap is not None:
        ranking, part_row = new(keys), new(keys)
        plan.ranking(scores, start, end, ranking, evicted, exits, totals)
        evicted = eviction_columns(ranking, vectors.document, plan.cap)
    if plan.lifetime is not None:
        totals = new(2, plan.scans)
        plan.lifetime(scores, start, end, ranking, evicted, exits, totals)
    plan.list(scores, start, end, ranking, evicted, exits, totals, columns, before, part_row)
    if plan.chunk_list is None:
        return RetainedLists(exits, columns, before)
    chunk_columns, block_size = new(plan.chunks, plan.width), new(plan.blocks)
    chunk_stable, chunk_size = new(plan.chunks), new(plan.chunks)
    plan.chunk_list(exits, columns, before, chunk_columns, chunk_stable, chunk_size, block_size)
    return RetainedLists(exits, columns, before, part_row, chunk_columns, chunk_stable, chunk_size, block_size)


@triton.jit  # type: ignore[untyped-decorator]
def parts_of_queries(before_ptr, part_rows, chunk, time, keys, CAPPED: tl.constexpr):
    """Into what parts the queries of a (b, h)'s retained keys are cut, each with a partial gradient of every key.

    Args:
        before_ptr: `[S + 1]` of this (b, h).

    Returns:
        query rows of one part, and the distance of the parts of one key in rows of partial gradients.
    """
    if CAPPED:
        return chunk, 1
    else:
        # As many parts as there is room for: few keys are split finely, many are parallel enough by themselves.
        number = tl.load(before_ptr + keys)
        chunks = tl.cdiv(time, chunk)
        splits = tl.minimum(tl.maximum(part_rows // tl.maximum(number, 1), 1), chunks)
        return (chunks + splits - 1) // splits * chunk, number


@triton.jit  # type: ignore[untyped-decorator]
def first_part_row(before_ptr, part_row_ptr, column, mask, enter, span, stride, CAPPED: tl.constexpr):
    """The row of each key's first partial gradient; before_ptr and part_row_ptr of this (b, h)."""
    if CAPPED:
        return tl.load(part_row_ptr + column, mask=mask, other=0)
    else:
        return enter // span * stride + tl.load(before_ptr + column, mask=mask, other=0)


@triton.jit(do_not_specialize=INTEGERS)  # type: ignore[untyped-decorator]
def _list_kernel(
    score_ptr,
    start_ptr,
    end_ptr,
    ranking_ptr,
    evicted_ptr,
    exit_ptr,  # [B, H, S], written if ALONE
    totals_ptr,  # [B, H, 2, scans], read unless ALONE
    columns_ptr,  # [B, H, S]
    before_ptr,  # [B, H, S + 1]
    part_row_ptr,  # [B, H, S], written if CAPPED
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
    ALONE: tl.constexpr,
    SCANS: tl.constexpr,
    SCAN: tl.constexpr,
):
    row_head = tl.program_id(1).to(tl.int64)
    scan = tl.program_id(0)
    scans = tl.num_programs(0)
    column = scan * SCAN + tl.arange(0, SCAN)
    exists = column < keys
    if ALONE:
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
        first = 0
        first_part = 0
    else:
        leave = tl.load(exit_ptr + row_head * keys + column, mask=exists, other=0)
        enter = enter_row(column, offset, prefix, window)
        retained = exists & (leave > enter)
        others = tl.arange(0, SCANS)
        totals_ptr += row_head * 2 * scans
        first = tl.sum(tl.load(totals_ptr + others, mask=others < scan, other=0), 0)
        if CAPPED:
            first_part = tl.sum(tl.load(totals_ptr + scans + others, mask=others < scan, other=0), 0)

    count = retained.to(tl.int32)
    index = first + tl.cumsum(count, 0) - count
    tl.store(columns_ptr + row_head * keys + index, column, mask=retained)
    tl.store(before_ptr + row_head * (keys + 1) + column, index, mask=exists)
    if scan == scans - 1:
        tl.store(before_ptr + row_head * (keys + 1) + keys, first + tl.sum(count, 0))
    if CAPPED:
        parts = chunks_of(enter, leave, retained, chunk)
        part_row = first_part + tl.cumsum(parts, 0) - parts
        tl.store(part_row_ptr + row_head * keys + column, part_row, mask=retained)


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
