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

from ..launch import early_option, launch, launches_early
from ..rotary.inside import load_angles, load_rotated, tables_of
from .softmax import NO_LOGIT, add_tile, join_splits

SETTINGS_VARIABLE = "HYBRIDIZE_RETAINED_DECODE"
"""Environment variable that overrides the table below: "block_slots,num_warps,num_stages,num_programs"."""

# By bytes of one key in memory, at most: slots a tile, warps, stages, and the programs to aim at (two for each of the
# 132 processors of an H100). Chosen by bandwidth there.
SETTINGS = {
    128: (64, 4, 3, 264),
    256: (64, 4, 4, 264),
    512: (32, 4, 2, 264),
    1024: (16, 4, 2, 264),
}
SHORT_SLOTS = 1024
"""A cache of so many slots at most is shared out half as far: to join its parts takes longer than to read them."""
MAX_SPLITS = 64
MAX_SCORES = 1024
"""Retained scores that are compared at once."""
SCRATCH = "retained_decode"
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
    if slots <= SHORT_SLOTS and SETTINGS_VARIABLE not in os.environ:
        programs //= 2
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
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `hybridize_kernels.retained_decode`."""
    batch, _, query_heads, head_size = q.shape
    heads, slots = keys.shape[1:3]
    (q, q_row), (k, k_row), (v, v_row) = (_rows_of_heads(x) for x in (q, k, v))
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch * head_size == 0:
        return output
    group, capacity = query_heads // heads, slots - window
    block, num_warps, num_stages, _ = settings(head_size * keys.element_size())
    splits = num_splits(keys)
    scratch = output if splits == 1 else _scratch(keys, query_heads, splits, workspace)
    tables = tables_of(rotary, last_position)
    early = launches_early(keys)
    # The longest axis goes first: the others end at 65535.
    launch(
        _decode_kernel,
        (batch * heads, splits),
        (
            *(q, k, v, tables.cos, tables.sin, keys, values),
            last_position if scores is None else scores,
            last_position if retained_positions is None else retained_positions,
            last_position if num_retained is None else num_retained,
            last_position if fresh_score is None else fresh_score.contiguous(),
            positions,
            last_position,
            output,
            scratch,
        ),
        (
            *(q_row, k_row, v_row, tables.row, positions.stride(0)),
            *(scale * LOG2_E, batch, heads, window, capacity, sinks, margin, splits),
        ),
        G=group,
        D=head_size,
        R=tables.size,
        BLOCK_G=max(16, triton.next_power_of_2(group)),  # the fewest rows of a matrix product
        BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        BLOCK_S=block,
        BLOCK_C=min(MAX_SCORES, triton.next_power_of_2(max(capacity, 1))),
        BLOCK_SPLITS=MAX_SPLITS,
        SCORED=scores is not None,
        FRESH=fresh_score is not None,
        SPLIT=splits > 1,
        EARLY=early,
        num_warps=num_warps,
        num_stages=num_stages,
        **early_option(early),
    )
    return output


def _rows_of_heads(x: Tensor) -> tuple[Tensor, int]:
    """x `[B, 1, H, D]` itself if a row's heads lie one after the other, and how far apart the rows lie."""
    batch, _, heads, size = x.shape
    if x.stride(3) != 1 or (heads > 1 and x.stride(2) != size):
        x = x.contiguous()
    return x, x.stride(0) if batch > 1 else 0


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


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "cos_row",
        "positions_stride",
        "batch",
        "heads",
        "window",
        "capacity",
        "sinks",
        "margin",
        "splits",
    ]
)
def _decode_kernel(
    q_ptr,  # [B, HQ, D], rows apart, as those of k and v
    k_ptr,  # [B, H, D]
    v_ptr,
    cos_ptr,  # [B or 1, R]
    sin_ptr,
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
    q_row,
    k_row,
    v_row,
    cos_row,
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
    R: tl.constexpr,  # numbers of a head that are rotated
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SCORED: tl.constexpr,
    FRESH: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row_head = tl.program_id(0).to(tl.int64)  # offsets pass 2**31 long before memory ends
    split = tl.program_id(1)
    row, head = row_head // heads, row_head % heads
    position = tl.load(positions_ptr + row * positions_stride).to(tl.int32)
    rows = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    in_d = columns < D
    in_q = (rows < G)[:, None] & in_d[None, :]
    output_offset = row_head * (G * D) + rows[:, None] * D + columns[None, :]
    if position < 0:
        if EARLY:
            tl.extra.cuda.gdc_wait()  # who waits for this kernel counts on its having waited
        nothing = tl.zeros([BLOCK_G, BLOCK_D], dtype=output_ptr.dtype.element_ty)
        tl.store(output_ptr + output_offset, nothing, mask=in_q & (split == 0))
        return

    # The first tile is asked for before anything is known of the step: it does not hang on the kernel before this one.
    slots = window + capacity
    ring = position % window
    leaving = position - window
    keys_ptr += row_head * slots * D
    values_ptr += row_head * slots * D
    retained = tl.minimum(tl.maximum(leaving, 0), sinks)
    if SCORED:
        retained = tl.load(num_retained_ptr + row_head)
    end = tl.minimum(position, window) + retained
    share = tl.cdiv(tl.cdiv(end, BLOCK_S), splits) * BLOCK_S
    start = split * share
    stop = tl.minimum(start + share, end)
    slot = start + tl.arange(0, BLOCK_S)
    offset = slot[:, None] * D + columns[None, :]
    in_tile = (slot < stop)[:, None] & in_d[None, :]
    first_key = tl.load(keys_ptr + offset, mask=in_tile, other=0.0)
    first_value = tl.load(values_ptr + offset, mask=in_tile, other=0.0)
    old_key = tl.load(keys_ptr + ring * D + columns, mask=in_d, other=0.0)
    old_value = tl.load(values_ptr + ring * D + columns, mask=in_d, other=0.0)
    cos, sin = load_angles(cos_ptr + row * cos_row, sin_ptr + row * cos_row, columns, True, R)

    # Where the token that leaves the ring goes, from the cache as it was before the step.
    victim = tl.full([], -1, tl.int32)
    if SCORED:
        scores_ptr += row_head * slots
        retained_positions_ptr += row_head * capacity
        score = tl.load(scores_ptr + ring)
        if FRESH:
            if EARLY:
                tl.extra.cuda.gdc_wait()
            fresh = tl.load(fresh_ptr + row_head).to(tl.float32)
            score = tl.where(margin == window, fresh, score)
        admitted = (leaving >= 0) & ((leaving < sinks) | (score > 0))
        if admitted & (retained == capacity):
            lowest, bits = _lowest_ranked(scores_ptr + window, retained_positions_ptr, capacity, sinks, BLOCK_C)
            admitted = (capacity > 0) & (score.to(tl.int32, bitcast=True) > bits)
            victim = tl.where(admitted, lowest, -1)
        target = tl.where(victim >= 0, victim, retained)
    else:
        admitted = (leaving >= 0) & (leaving < sinks)
        target = leaving
    if EARLY:
        tl.extra.cuda.gdc_wait()

    # Attention over the old cache less what the step hides; the first split adds the new token.
    heads_ptr = q_ptr + row * q_row + (head * G + rows[:, None]) * D
    query = load_rotated(heads_ptr, columns[None, :], in_q, cos[None, :], sin[None, :], R)
    new_key = load_rotated(k_ptr + row * k_row + head * D, columns, in_d, cos, sin, R)
    new_value = tl.load(v_ptr + row * v_row + head * D + columns, mask=in_d, other=0.0)
    own = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scale_log2
    first = split == 0
    maximum = tl.where(first, own, NO_LOGIT)
    total = tl.zeros([BLOCK_G], dtype=tl.float32) + tl.where(first, 1.0, 0.0)
    output = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    output += tl.where(first, new_value.to(tl.float32), 0.0)[None, :]
    query = query.to(keys_ptr.dtype.element_ty)
    gone = tl.where(admitted, -1, ring)  # the ring's leaving token is seen this once from where it lay
    replaced = tl.where(victim >= 0, window + victim, -1)
    seen = (slot < stop) & (slot != gone) & (slot != replaced)
    maximum, total, output = add_tile(query, first_key, first_value, seen, scale_log2, maximum, total, output)
    for tile in range(start + BLOCK_S, stop, BLOCK_S):
        slot = tile + tl.arange(0, BLOCK_S)
        offset = slot[:, None] * D + columns[None, :]
        in_tile = (slot < stop)[:, None] & in_d[None, :]
        key = tl.load(keys_ptr + offset, mask=in_tile, other=0.0)
        value = tl.load(values_ptr + offset, mask=in_tile, other=0.0)
        seen = (slot < stop) & (slot != gone) & (slot != replaced)
        maximum, total, output = add_tile(query, key, value, seen, scale_log2, maximum, total, output)

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
        joined = join_splits(
            workspace_ptr, maximum_ptr, total_ptr, row_head, splits, G, D, ROWS, BLOCK_D, BLOCK_SPLITS, TILE
        )
        group = tl.arange(0, ROWS)
        offset = row_head * (G * D) + group[:, None] * D + columns[None, :]
        valid = (group < G)[:, None] & in_d[None, :]
        tl.store(output_ptr + offset, joined.to(output_ptr.dtype.element_ty), mask=valid)
    else:
        output = output / total[:, None]
        tl.store(output_ptr + output_offset, output.to(output_ptr.dtype.element_ty), mask=in_q)

    # Nobody reads this head's cache any more: move the leaving token, then write the new one where it lay.
    tl.debug_barrier()
    tl.store(keys_ptr + (window + target) * D + columns, old_key, mask=in_d & admitted)
    tl.store(values_ptr + (window + target) * D + columns, old_value, mask=in_d & admitted)
    tl.store(keys_ptr + ring * D + columns, new_key.to(old_key.dtype), mask=in_d)
    tl.store(values_ptr + ring * D + columns, new_value.to(old_value.dtype), mask=in_d)
    tl.store(last_position_ptr + row, position, mask=head == 0)
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
