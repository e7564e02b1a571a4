"""A decoding step of retained attention as one Triton launch.

A program owns a key head of a row, all of its query heads, and a share of the occupied slots, which it reads once. The
cache is written by the last program of a head to finish, when no other reads it any more; the same one joins the
programs' partial results. Every program finds by itself which slots the step hides, so that nobody waits.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

SETTINGS_VARIABLE = "HYBRIDIZE_RETAINED_DECODE"
"""Environment variable that overrides the table below: "block_slots,num_warps,num_stages,num_programs"."""

# By bytes of one key in memory, at most: slots a tile, warps, stages, and the programs to aim at (two for each of the
# 132 processors of an H100). Chosen by bandwidth there.
SETTINGS = {
    128: (64, 2, 3, 264),
    256: (64, 4, 4, 264),
    512: (32, 4, 2, 264),
    1024: (16, 4, 2, 264),
}
MAX_SPLITS = 64
MAX_SCORES = 1024
"""Retained scores that are compared at once."""
SCRATCH = "retained_decode"
NO_LOGIT = tl.constexpr(-1e30)  # finite, so that the difference of two of them is a number
LOG2_E = 1.4426950408889634


def settings(row_bytes: int) -> tuple[int, int, int, int]:
    """Slots a tile, warps, stages and programs to aim at for keys of so many bytes."""
    override = os.environ.get(SETTINGS_VARIABLE)
    if override:
        block, warps, stages, programs = (int(part) for part in override.split(","))
        return block, warps, stages, programs
    return SETTINGS[min(size for size in SETTINGS if size >= min(row_bytes, max(SETTINGS)))]


def num_splits(keys: Tensor) -> int:
    """Programs a key head of keys `[B, H, W + C, D]`: one where rows and heads alone fill the GPU."""
    batch, heads, slots, head_size = keys.shape
    block, _, _, programs = settings(head_size * keys.element_size())
    wanted = -(-programs // max(batch * heads, 1))
    return max(1, min(wanted, -(-slots // block), MAX_SPLITS))


def _scratch(keys: Tensor, query_heads: int, splits: int, workspace: dict[str, Tensor] | None) -> Tensor:
    """Scratch memory for steps on keys `[B, H, W + C, D]`, fp32, from the workspace if it is there and fits.

    For each row and head its splits' outputs `[splits, G, D]`, maxima and sums `[splits, G]` each; then, zero between
    two steps, the number of splits that are done.
    """
    batch, heads, _, head_size = keys.shape
    partial = batch * splits * query_heads * (head_size + 2)
    # Told apart by all that places the counters in it: another layout of the same size would take sums for counters.
    name = f"{SCRATCH} {batch} {heads} {splits} {query_heads} {head_size}"
    stored = None if workspace is None else workspace.get(name)
    if stored is not None and stored.device == keys.device:
        return stored
    scratch = torch.empty(partial + batch * heads, dtype=torch.float32, device=keys.device)
    scratch[partial:].zero_()
    # What a graph that is being captured allocates and clears is its own: nobody else may count on it.
    if workspace is not None and not (keys.is_cuda and torch.cuda.is_current_stream_capturing()):
        workspace.clear()
        workspace[name] = scratch
    return scratch


def retained_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    last_position: Tensor,
    *,
    window: int,
    sinks: int,
    positions: Tensor,
    scale: float,
    scores: Tensor | None = None,
    retained_positions: Tensor | None = None,
    num_retained: Tensor | None = None,
    fresh_score: Tensor | None = None,
    margin: int = 0,
    workspace: dict[str, Tensor] | None = None,
) -> Tensor:
    """See `hybridize_kernels.retained_decode`."""
    batch, _, query_heads, head_size = q.shape
    heads, slots = keys.shape[1:3]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    output = torch.empty_like(q)
    if batch * head_size == 0:
        return output
    group, capacity = query_heads // heads, slots - window
    block, num_warps, num_stages, _ = settings(head_size * keys.element_size())
    splits = num_splits(keys)
    scratch = output if splits == 1 else _scratch(keys, query_heads, splits, workspace)
    # The longest axis goes first: the others end at 65535.
    launch(
        _decode_kernel,
        (batch * heads, splits),
        (
            q,
            k,
            v,
            keys,
            values,
            last_position if scores is None else scores,
            last_position if retained_positions is None else retained_positions,
            last_position if num_retained is None else num_retained,
            last_position if fresh_score is None else fresh_score.contiguous(),
            positions,
            last_position,
            output,
            scratch,
        ),
        (positions.stride(0), scale * LOG2_E, batch, heads, window, capacity, sinks, margin, splits),
        G=group,
        D=head_size,
        BLOCK_G=max(16, triton.next_power_of_2(group)),  # the fewest rows of a matrix product
        BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        BLOCK_S=block,
        BLOCK_C=min(MAX_SCORES, triton.next_power_of_2(max(capacity, 1))),
        BLOCK_SPLITS=MAX_SPLITS,
        SCORED=scores is not None,
        FRESH=fresh_score is not None,
        SPLIT=splits > 1,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return output


@triton.jit  # type: ignore[untyped-decorator]
def _lowest_ranked(scores_ptr, positions_ptr, capacity, sinks, BLOCK_C: tl.constexpr):
    """The retained slot that goes first, and the bits of its score (sinks: the largest).

    Retained scores are positive, so their bits grow with them; below them, as of equals the latest goes first, stands
    what falls as the position grows. Score and age are compared as one number.
    """
    lowest = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    slot = tl.full([], 0, tl.int32)
    for start in range(0, capacity, BLOCK_C):
        index = start + tl.arange(0, BLOCK_C)
        inside = index < capacity
        score = tl.load(scores_ptr + index, mask=inside, other=0.0)
        position = tl.load(positions_ptr + index, mask=inside, other=0)
        bits = tl.where(position < sinks, 0x7FFFFFFF, score.to(tl.int32, bitcast=True))
        rank = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - position).to(tl.int64)
        rank = tl.where(inside, rank, 0x7FFFFFFFFFFFFFFF)
        low = tl.min(rank, axis=0)
        here = tl.min(tl.where(rank == low, index, 0x7FFFFFFF), axis=0)
        slot = tl.where(low < lowest, here, slot)
        lowest = tl.minimum(low, lowest)
    return slot, (lowest >> 32).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _join_splits(
    partial_ptr,  # [B, H, splits, G, D]
    maximum_ptr,  # [B, H, splits, G]
    total_ptr,
    row_head,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The attention of a row and head, [ROWS, BLOCK_D], from its splits'; in their order, whoever came last."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    every = tl.arange(0, BLOCK_SPLITS)
    offset = (row_head * splits + every[:, None]) * G + rows[None, :]
    valid = (every[:, None] < splits) & (rows[None, :] < G)
    # One read for all: a loop would wait for each.
    maxima = tl.load(maximum_ptr + offset, mask=valid, other=NO_LOGIT)
    totals = tl.load(total_ptr + offset, mask=valid, other=0.0)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(totals * tl.exp2(maxima - maximum[None, :]), axis=0)
    joined = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for start in range(0, splits, TILE):
        some = start + tl.arange(0, TILE)
        place = (row_head * splits + some[:, None]) * G + rows[None, :]
        there = (some[:, None] < splits) & (rows[None, :] < G)
        weight = tl.exp2(tl.load(maximum_ptr + place, mask=there, other=NO_LOGIT) - maximum[None, :])
        partial = tl.load(
            partial_ptr + place[:, :, None] * D + columns[None, None, :],
            mask=there[:, :, None] & (columns < D)[None, None, :],
            other=0.0,
        )
        joined += tl.sum(weight[:, :, None] * partial, axis=0)
    return joined / tl.where(rows < G, total, 1.0)[:, None]


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["positions_stride", "batch", "heads", "window", "capacity", "sinks", "margin", "splits"]
)
def _decode_kernel(
    q_ptr,  # [B, HQ, D]
    k_ptr,  # [B, H, D]
    v_ptr,
    keys_ptr,  # [B, H, W + C, D]
    values_ptr,
    scores_ptr,  # [B, H, W + C]
    retained_positions_ptr,  # [B, H, C]
    num_retained_ptr,  # [B, H]
    fresh_ptr,  # [B, H]
    positions_ptr,  # [B]
    last_position_ptr,  # [B]
    output_ptr,  # [B, HQ, D]
    workspace_ptr,
    positions_stride,
    scale_log2,
    batch,
    heads,
    window,
    capacity,
    sinks,
    margin,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SCORED: tl.constexpr,
    FRESH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)  # offsets pass 2**31 long before memory ends
    split = tl.program_id(1)
    row = row_head // heads
    position = tl.load(positions_ptr + row * positions_stride).to(tl.int32)
    rows = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    in_d = columns < D
    in_q = (rows < G)[:, None] & in_d[None, :]
    q_offset = row_head * (G * D) + rows[:, None] * D + columns[None, :]
    if position < 0:
        nothing = tl.zeros([BLOCK_G, BLOCK_D], dtype=output_ptr.dtype.element_ty)
        tl.store(output_ptr + q_offset, nothing, mask=in_q & (split == 0))
        return

    # Where the token that leaves the ring goes, from the cache as it was before the step.
    slots = window + capacity
    ring = position % window
    leaving = position - window
    keys_ptr += row_head * slots * D
    values_ptr += row_head * slots * D
    victim = tl.full([], -1, tl.int32)
    if SCORED:
        scores_ptr += row_head * slots
        retained_positions_ptr += row_head * capacity
        retained = tl.load(num_retained_ptr + row_head)
        score = tl.load(scores_ptr + ring)
        if FRESH:
            fresh = tl.load(fresh_ptr + row_head).to(tl.float32)
            score = tl.where(margin == window, fresh, score)
        admitted = (leaving >= 0) & ((leaving < sinks) | (score > 0))
        if admitted & (retained == capacity):
            lowest, bits = _lowest_ranked(scores_ptr + window, retained_positions_ptr, capacity, sinks, BLOCK_C)
            admitted = (capacity > 0) & (score.to(tl.int32, bitcast=True) > bits)
            victim = tl.where(admitted, lowest, -1)
        target = tl.where(victim >= 0, victim, retained)
    else:
        retained = tl.minimum(tl.maximum(leaving, 0), sinks)
        admitted = (leaving >= 0) & (leaving < sinks)
        target = leaving

    # Attention over the old cache less what the step hides; the first split adds the new token.
    query = tl.load(q_ptr + q_offset, mask=in_q, other=0.0)
    new_key = tl.load(k_ptr + row_head * D + columns, mask=in_d, other=0.0)
    new_value = tl.load(v_ptr + row_head * D + columns, mask=in_d, other=0.0)
    own = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scale_log2
    first = split == 0
    maximum = tl.where(first, own, NO_LOGIT)
    total = tl.zeros([BLOCK_G], dtype=tl.float32) + tl.where(first, 1.0, 0.0)
    output = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    output += tl.where(first, new_value.to(tl.float32), 0.0)[None, :]
    query = query.to(keys_ptr.dtype.element_ty)
    gone = tl.where(admitted, -1, ring)  # the ring's leaving token is seen this once from where it lay
    replaced = tl.where(victim >= 0, window + victim, -1)
    end = tl.minimum(position, window) + retained
    share = tl.cdiv(tl.cdiv(end, BLOCK_S), splits) * BLOCK_S
    for start in range(split * share, tl.minimum(split * share + share, end), BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        in_s = slot < end
        offset = slot[:, None] * D + columns[None, :]
        in_tile = in_s[:, None] & in_d[None, :]
        key = tl.load(keys_ptr + offset, mask=in_tile, other=0.0)
        value = tl.load(values_ptr + offset, mask=in_tile, other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        seen = in_s & (slot != gone) & (slot != replaced)
        logit = tl.where(seen[None, :], logit, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logit, axis=1))
        shrink = tl.exp2(maximum - higher)
        weight = tl.exp2(logit - higher[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        output = tl.dot(weight.to(value.dtype), value, output * shrink[:, None], input_precision="ieee")
        maximum = higher

    if SPLIT:
        head_splits = batch.to(tl.int64) * heads * splits
        maximum_ptr = workspace_ptr + head_splits * (G * D)
        total_ptr = maximum_ptr + head_splits * G
        done_ptr = total_ptr + head_splits * G
        part = (row_head * splits + split) * G
        tl.store(workspace_ptr + part * D + rows[:, None] * D + columns[None, :], output, mask=in_q)
        tl.store(maximum_ptr + part + rows, maximum, mask=rows < G)
        tl.store(total_ptr + part + rows, total, mask=rows < G)
        # All of this program's reads and writes come before its count, all of the last one's after its own.
        tl.debug_barrier()
        done = tl.atomic_add(done_ptr + row_head, 1.0, sem="acq_rel")  # a float, as its neighbours; exact to 2**24
        tl.debug_barrier()
        if done.to(tl.int32) != splits - 1:
            return
        tl.store(done_ptr + row_head, 0.0)
        ROWS: tl.constexpr = G if G & (G - 1) == 0 else 1 << G.bit_length()
        TILE: tl.constexpr = 1 if ROWS * BLOCK_D >= 2048 else 2048 // (ROWS * BLOCK_D)
        joined = _join_splits(
            workspace_ptr, maximum_ptr, total_ptr, row_head, splits, G, D, ROWS, BLOCK_D, BLOCK_SPLITS, TILE
        )
        group = tl.arange(0, ROWS)
        offset = row_head * (G * D) + group[:, None] * D + columns[None, :]
        valid = (group < G)[:, None] & in_d[None, :]
        tl.store(output_ptr + offset, joined.to(output_ptr.dtype.element_ty), mask=valid)
    else:
        output = output / total[:, None]
        tl.store(output_ptr + q_offset, output.to(output_ptr.dtype.element_ty), mask=in_q)

    # Nobody reads this head's cache any more: move the leaving token, then write the new one where it lay.
    old_key = tl.load(keys_ptr + ring * D + columns, mask=in_d, other=0.0)
    old_value = tl.load(values_ptr + ring * D + columns, mask=in_d, other=0.0)
    tl.debug_barrier()
    tl.store(keys_ptr + (window + target) * D + columns, old_key, mask=in_d & admitted)
    tl.store(values_ptr + (window + target) * D + columns, old_value, mask=in_d & admitted)
    tl.store(keys_ptr + ring * D + columns, new_key.to(old_key.dtype), mask=in_d)
    tl.store(values_ptr + ring * D + columns, new_value.to(old_value.dtype), mask=in_d)
    tl.store(last_position_ptr + row, position, mask=row_head % heads == 0)
    if SCORED:
        tl.store(scores_ptr + window + target, score, mask=admitted)
        tl.store(retained_positions_ptr + target, leaving, mask=admitted)
        tl.store(num_retained_ptr + row_head, retained + 1, mask=admitted & (victim < 0))
        if FRESH:
            # Where margin is the window, its token has just left the ring; where it is 0, it is the new one.
            final = (margin > 0) & (margin < window) & (position >= margin)
            tl.store(scores_ptr + tl.maximum(position - margin, 0) % window, fresh, mask=final)
            tl.store(scores_ptr + ring, tl.where(margin == 0, fresh, 0.0))
        else:
            tl.store(scores_ptr + ring, 0.0)
