"""Second launch: which blocks are chosen, and the gated sum of the compressed and the window branch.

Of each key head of a row one program chooses; one for each of its query heads joins the parts of the first launch.
"""

import triton
import triton.language as tl

from .tiles import join, log_sum_exp


@triton.jit  # type: ignore[untyped-decorator]
def _lowest_chosen(bits, wanted, candidates):
    """The largest number that at least `wanted` of the bits [BLOCK_C] reach; 0 where there are no more candidates.

    Of probabilities the bits, read as integers, grow with the number: it is found bit by bit, without sorting.
    """
    threshold = tl.full([], 0, tl.int32)
    bit = tl.where(candidates > wanted, 30, -1)
    while bit >= 0:
        trial = threshold | (1 << bit)
        count = tl.sum((bits >= trial).to(tl.int32), axis=0)
        threshold = tl.where(count >= wanted, trial, threshold)
        bit = tl.where(count == wanted, -1, bit - 1)
    return threshold


@triton.jit  # type: ignore[untyped-decorator]
def _choose(
    chosen_ptr,  # of a row and head
    maxima_ptr,
    totals_ptr,
    logits_ptr,  # [G, blocks]
    current,
    blocks,
    block_splits,
    num_selected_blocks,
    G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Writes the chosen blocks: the first, the previous and the current one, then the best others in their order."""
    block = tl.arange(0, BLOCK_C)
    is_candidate = (block >= 1) & (block < current - 1)
    importance = tl.zeros([BLOCK_C], dtype=tl.float32)
    for g in range(G):
        maximum, total = log_sum_exp(maxima_ptr + g, totals_ptr + g, block_splits, G, BLOCK_PARTS)
        logit = tl.load(logits_ptr + g * blocks + block, mask=is_candidate, other=float("-inf"))
        importance += tl.exp2(logit - maximum) / tl.where(total > 0, total, 1.0)
    importance = tl.where(importance >= 0, importance, 0.0)  # NaN is no number to sort by
    bits = tl.where(is_candidate, importance.to(tl.int32, bitcast=True), -1)

    forced = tl.minimum(current + 1, 3)
    wanted = tl.maximum(num_selected_blocks - forced, 0)
    threshold = _lowest_chosen(bits, wanted, tl.maximum(current - 2, 0))
    better = bits > threshold
    ties = bits == threshold
    room = wanted - tl.sum(better.to(tl.int32), axis=0)
    is_chosen = better | (ties & (tl.cumsum(ties.to(tl.int32), axis=0) <= room))
    place = forced - 1 + tl.cumsum(is_chosen.to(tl.int32), axis=0)
    tl.store(chosen_ptr + place, block.to(tl.float32), mask=is_chosen)
    first = tl.arange(0, 4)
    number = tl.where(first == 0, current, tl.where(first == 1, 0, current - 1))
    tl.store(chosen_ptr + first, number.to(tl.float32), mask=first < forced)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "positions_stride",
        "heads",
        "capacity",
        "blocks",
        "block_size",
        "num_selected_blocks",
        "dense_below",
        "most_chosen",
        "block_splits",
        "window_splits",
    ]
)
def choose_kernel(
    gates_ptr,  # [B, HQ, 3]
    positions_ptr,  # [B]
    parts_ptr,  # [B, H, parts, G, D] fp32
    maxima_ptr,  # [B, H, parts, G]
    totals_ptr,
    logits_ptr,  # [B, H, G, blocks]
    chosen_ptr,  # [B, H, most_chosen], whole numbers as floats; exact to 2**24
    others_ptr,  # [B, HQ, D], the compressed and the window branch
    positions_stride,
    heads,
    capacity,
    blocks,
    block_size,
    num_selected_blocks,
    dense_below,
    most_chosen,
    block_splits,
    window_splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) - 1
    position = tl.load(positions_ptr + row_head // heads * positions_stride).to(tl.int32)
    if (position < dense_below) | (position < 0) | (position >= capacity):
        return
    part = row_head * (block_splits + window_splits) * G
    if g < 0:
        _choose(
            chosen_ptr + row_head * most_chosen,
            maxima_ptr + part,
            totals_ptr + part,
            logits_ptr + row_head * G * blocks,
            position // block_size,
            blocks,
            block_splits,
            num_selected_blocks,
            G,
            BLOCK_C,
            BLOCK_PARTS,
        )
    else:
        part += g
        compressed = join(
            parts_ptr + part * D, maxima_ptr + part, totals_ptr + part, block_splits, G, D, BLOCK_D, BLOCK_PARTS, TILE
        )
        part += block_splits * G
        near = join(
            parts_ptr + part * D, maxima_ptr + part, totals_ptr + part, window_splits, G, D, BLOCK_D, BLOCK_PARTS, TILE
        )
        head = row_head * G + g
        compressed *= tl.load(gates_ptr + head * 3).to(tl.float32)
        near *= tl.load(gates_ptr + head * 3 + 2).to(tl.float32)
        columns = tl.arange(0, BLOCK_D)
        tl.store(others_ptr + head * D + columns, compressed + near, mask=columns < D)
