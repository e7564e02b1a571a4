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

from .layout import ceil_div

NEVER = tl.constexpr(2**31 - 1)
LENGTH = 128
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
    num_kept = (ordered >= 0).sum(-1, dtype=torch.int32)
    rank = torch.empty_like(key)
    rank.scatter_(-1, order, torch.arange(keys, dtype=torch.int32, device=key.device).expand_as(key))
    chunks = ceil_div(keys, LENGTH)
    evicted = torch.empty_like(key)
    with torch.cuda.device_of(key):
        _eviction_kernel[(chunks, batch * heads)](
            order.to(torch.int32),
            rank,
            num_kept,
            torch.empty(batch * heads, chunks, LENGTH, dtype=torch.int32, device=key.device),
            evicted,
            keys,
            budget,
            LENGTH=LENGTH,
            SCAN=SCAN,
            CANDIDATES=CANDIDATES,
            num_warps=4,
        )
    return evicted


@triton.jit(do_not_specialize=["keys", "budget"])  # type: ignore[untyped-decorator]
def _eviction_kernel(
    order_ptr,  # [B·H, S] the column of each rank
    rank_ptr,  # [B·H, S] the rank of each column
    num_kept_ptr,  # [B·H]
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
    num_kept = tl.load(num_kept_ptr + row)
    if first >= num_kept:
        return
    order_ptr += row * keys
    rank_ptr += row * keys
    scratch_ptr += (row * tl.num_programs(0) + tl.program_id(0)) * LENGTH
    time = tl.arange(0, LENGTH)
    is_rank = first + time < num_kept
    column = tl.load(order_ptr + first + time, mask=is_rank, other=NEVER)

    # The budget smallest columns of better rank, numbered from 0; slot s holds number budget − LENGTH + s.
    shift = budget - LENGTH
    tl.store(scratch_ptr + time, tl.where(time + shift < 0, -1, NEVER))
    tl.debug_barrier()
    count = 0
    scanned = 0
    while (scanned < keys) & (count < budget) & (count < first):
        columns = scanned + tl.arange(0, SCAN)
        better = (tl.load(rank_ptr + columns, mask=columns < keys, other=NEVER) < first).to(tl.int32)
        slot = count + tl.cumsum(better, 0) - 1 - shift
        tl.store(scratch_ptr + slot, columns, mask=(better > 0) & (slot >= 0) & (slot < LENGTH))
        count += tl.sum(better, 0)
        scanned += SCAN
    tl.debug_barrier()

    # At time t (before the key of rank first + t) the C-th smallest is the largest key with fewer than C below it.
    filled = tl.full([LENGTH], -1, tl.int32)
    for start in range(0, LENGTH, CANDIDATES):
        slots = start + tl.arange(0, CANDIDATES)
        value = tl.load(scratch_ptr + slots)
        below = _arrived_below(value, column) + (shift + slots)[:, None]
        alive = (below < budget) & (value != NEVER)[:, None]
        filled = tl.maximum(filled, tl.max(tl.where(alive, value[:, None], -1), 0))

        value = tl.load(order_ptr + first + slots, mask=first + slots < num_kept, other=NEVER)
        better = tl.load(scratch_ptr + time)
        below = tl.sum((better[None, :] < value[:, None]).to(tl.int32), 1) + shift
        below = _arrived_below(value, column) + below[:, None]
        alive = (below < budget) & (slots[:, None] < time[None, :])
        filled = tl.maximum(filled, tl.max(tl.where(alive, value[:, None], -1), 0))
    filled = tl.where(first + time < budget, NEVER, tl.maximum(filled, column))
    tl.store(evicted_ptr + row * keys + column, filled, mask=is_rank)


@triton.jit  # type: ignore[untyped-decorator]
def _arrived_below(value, column):
    """How many of column[0 .. t) lie below each value: `[values, times]`."""
    less = (column[None, :] < value[:, None]).to(tl.int32)
    return tl.cumsum(less, 1) - less
