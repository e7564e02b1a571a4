"""From which column on each kept key has lost its slot, on the device, without sorting twice and without [S, S].

Keys stand in order of position. With C = budget, the key of rank r is evicted by the column that is the C-th smallest
among the keys of better rank: a running order statistic over the ranking. A program takes LENGTH ranks. It collects the
last LENGTH of the C smallest columns among all better ranks, the only ones that its own LENGTH keys can push out, and
then counts inside that small set.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import ceil_div

NEVER = tl.constexpr(2**31 - 1)
LENGTH = 64
SCAN = 1024
CANDIDATES = 32


def eviction_columns(key: Tensor, document: Tensor | None, budget: int) -> Tensor:
    """The first column from which on each key is evicted; NEVER if none, its own column if it never gets a slot.

    Args:
        key: int32 `[B, H, S]`, the ranking: higher first, the earlier column on a tie; −1 where a key is not kept.
        document: int32 `[S]`, non-decreasing; keys compete inside their document. The columns of later documents may
            stand in the result and lie past the document's end. None: one document.
        budget: at least 1.

    Returns:
        int32 `[B, H, S]`; undefined where a key is not kept.
    """
    batch, heads, keys = key.shape
    ranking = key
    if document is not None:
        # A later document outranks an earlier one, whose keys are then out of competition before its first key comes.
        ranking = torch.where(key >= 0, (document.long() << 32) + key, -1)
    ordered, order = ranking.sort(dim=-1, descending=True, stable=True)
    chunks = ceil_div(keys, LENGTH)
    scratch, evicted = key.new_empty(batch * heads, chunks, LENGTH), torch.empty_like(key)
    launch(
        _eviction_kernel,
        (chunks, batch * heads),
        (ranking, ordered, order, scratch, evicted),
        (keys, budget),
        LENGTH=LENGTH,
        SCAN=SCAN,
        CANDIDATES=CANDIDATES,
        num_warps=4,
        num_stages=1,
    )
    return evicted


@triton.jit(do_not_specialize=["keys", "budget"])  # type: ignore[untyped-decorator]
def _eviction_kernel(
    ranking_ptr,  # [B·H, S] by column
    ordered_ptr,  # [B·H, S] by rank
    order_ptr,  # [B·H, S] int64, the column of each rank
    scratch_ptr,  # [B·H, chunks, LENGTH]
    evicted_ptr,  # [B·H, S]
    keys,
    budget,
    LENGTH: tl.constexpr,
    SCAN: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * LENGTH  # rank
    ranking_ptr += row * keys
    ordered_ptr += row * keys
    order_ptr += row * keys
    first_ranking = tl.load(ordered_ptr + first)
    if first_ranking < 0:  # those that are not kept come last
        return
    scratch_ptr += (row * tl.num_programs(0) + tl.program_id(0)) * LENGTH
    time = tl.arange(0, LENGTH)
    is_rank = tl.load(ordered_ptr + first + time, mask=first + time < keys, other=-1) >= 0
    first_column = tl.load(order_ptr + first).to(tl.int32)
    column = tl.load(order_ptr + first + time, mask=is_rank, other=NEVER).to(tl.int32)

    # The budget smallest columns of better rank, numbered from 0; slot s holds number budget − LENGTH + s.
    shift = budget - LENGTH
    tl.store(scratch_ptr + time, tl.where(time + shift < 0, -1, NEVER))
    tl.debug_barrier()
    count = 0
    scanned = 0
    while (scanned < keys) & (count < budget) & (count < first):
        columns = scanned + tl.arange(0, SCAN)
        other = tl.load(ranking_ptr + columns, mask=columns < keys, other=-1)
        better = ((other > first_ranking) | ((other == first_ranking) & (columns < first_column))).to(tl.int32)
        slot = count + tl.cumsum(better, 0) - 1 - shift
        tl.store(scratch_ptr + slot, columns, mask=(better > 0) & (slot >= 0) & (slot < LENGTH))
        count += tl.sum(better, 0)
        scanned += SCAN
    tl.debug_barrier()

    # At time t (before the key of rank first + t) the C-th smallest is the largest key with fewer than C below it.
    filled = tl.full([LENGTH], -1, tl.int32)
    earlier = (time[:, None] < time[None, :]).to(tl.float16)
    for start in range(0, LENGTH, CANDIDATES):
        slots = start + tl.arange(0, CANDIDATES)
        value = tl.load(scratch_ptr + slots)
        below = _arrived_below(value, column, earlier) + (shift + slots)[:, None]
        alive = (below < budget) & (value != NEVER)[:, None]
        filled = tl.maximum(filled, tl.max(tl.where(alive, value[:, None], -1), 0))

        kept = tl.load(ordered_ptr + first + slots, mask=first + slots < keys, other=-1) >= 0
        value = tl.load(order_ptr + first + slots, mask=kept, other=NEVER).to(tl.int32)
        better = tl.load(scratch_ptr + time)
        below = tl.sum((better[None, :] < value[:, None]).to(tl.int32), 1) + shift
        below = _arrived_below(value, column, earlier) + below[:, None]
        alive = (below < budget) & (slots[:, None] < time[None, :])
        filled = tl.maximum(filled, tl.max(tl.where(alive, value[:, None], -1), 0))
    filled = tl.where(first + time < budget, NEVER, tl.maximum(filled, column))
    tl.store(evicted_ptr + row * keys + column, filled, mask=is_rank)


@triton.jit  # type: ignore[untyped-decorator]
def _arrived_below(value, column, earlier):
    """How many of column[0 .. t) lie below each value: `[values, times]`; earlier[s, t]: s < t."""
    # A product of zeros and ones, exact in fp16's inputs and fp32's sums, is quicker than sums over time.
    less = (column[None, :] < value[:, None]).to(tl.float16)
    return tl.dot(less, earlier).to(tl.int32)
