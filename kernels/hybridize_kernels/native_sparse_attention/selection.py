"""Which blocks each query attends to token by token, as bits: one word a tile of queries and block.

Bit i of `words[h, tile, c]` says that the tile's query i chose block c, be it that its score is among the best or that
it is the first, the current or the previous block. All that follows (unions, lists by block) is read off these words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import multiprocessors
from ..launch import launch
from .compressed import block_scores
from .layout import FORCED, TILE, Layout, power_of_two
from .rows import TILE_FIELDS

SCORE_BYTES = 128 * 2**20
"""Of the scores that lie in memory at a time, unless they are of fewer than PROGRAMS programs a processor."""
PROGRAMS = 4
ELEMENTS = 2048
"""Scores that a warp looks at together: a row in one warp needs no other to count with."""


def choose_blocks(
    q: Tensor,
    compressed_k: Tensor,
    log_sum_exp: Tensor,
    layout: Layout,
    *,
    block_size: int,
    num_selected_blocks: int,
    scale: float,
) -> Tensor:
    """The words `[H, num_tiles, most_blocks]`, int32.

    Args:
        q: `[B, T, HQ, D]`. compressed_k: `[num_blocks, H, D]`. log_sum_exp: `[B, T, HQ]` of the compressed branch, in
            base 2.
    """
    heads, num_tiles = compressed_k.shape[1], len(layout.tiles)
    words = torch.empty(heads, num_tiles, layout.most_blocks, dtype=torch.int32, device=q.device)
    if words.numel() == 0:
        return words
    at_a_time = max(
        SCORE_BYTES // (4 * heads * TILE * layout.most_blocks),
        -(-PROGRAMS * multiprocessors(q.get_device()) // heads),
    )
    columns = power_of_two(layout.most_blocks)
    rows = max(1, min(TILE, ELEMENTS // columns))
    for first in range(0, num_tiles, at_a_time):
        count = min(at_a_time, num_tiles - first)
        scores = block_scores(q, compressed_k, log_sum_exp, layout, block_size, scale, first, count)
        launch(
            choose_kernel,
            (count, heads),
            (layout.tiles, scores, words),
            (first, num_tiles, layout.most_blocks, max(0, num_selected_blocks - FORCED)),
            BS=block_size,
            TILE=TILE,
            ROWS=rows,
            BLOCK_C=columns,
            num_warps=1 if columns <= ELEMENTS else 4,
        )
    return words


@triton.jit  # type: ignore[untyped-decorator]
def best(bits, keep, rounds):
    """Of each row of bits `[rows, columns]` (of numbers that are not negative; −1: none) the `keep` largest, and of
    equal ones the first. What is looked for is a least number to stay, bit by bit: no row is ever sorted."""
    least = tl.zeros([bits.shape[0]], tl.int32)
    staying = tl.sum((bits >= 0).to(tl.int32), 1)
    too_many = tl.max(staying, 0) - keep
    for n in range(rounds):
        if too_many > 0:
            candidate = least | (1 << (30 - n))
            count = tl.sum((bits >= candidate[:, None]).to(tl.int32), 1)
            least = tl.where(count >= keep, candidate, least)
            staying = tl.where(count >= keep, count, staying)
            too_many = tl.max(staying, 0) - keep
    above = bits > least[:, None]
    equal = (bits == least[:, None]).to(tl.int32)
    room = keep - tl.sum(above.to(tl.int32), 1)
    return above | ((equal > 0) & (tl.cumsum(equal, 1) <= room[:, None]))


@triton.jit(do_not_specialize=["first_tile", "num_tiles", "num_columns", "keep"])  # type: ignore[untyped-decorator]
def choose_kernel(
    tiles_ptr,  # [num_tiles, 8]
    scores_ptr,  # [H, tiles of this launch, TILE, num_columns]
    words_ptr,  # [H, num_tiles, num_columns], written
    first_tile,
    num_tiles,
    num_columns,
    keep,
    BS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    tile = first_tile + tl.program_id(0)
    row = tl.load(tiles_ptr + tile * TILE_FIELDS + 1)
    low = tl.load(tiles_ptr + tile * TILE_FIELDS + 2)
    high = tl.load(tiles_ptr + tile * TILE_FIELDS + 3)
    position = tl.load(tiles_ptr + tile * TILE_FIELDS + 4)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < num_columns
    scores_ptr += (head * tl.num_programs(0) + tl.program_id(0)) * TILE * num_columns
    words = tl.zeros([BLOCK_C], tl.int32)
    for first in range(0, TILE, ROWS):
        query = first + tl.arange(0, ROWS)
        valid = (row + query >= low) & (row + query < high)
        current = (position + query) // BS
        may = valid[:, None] & (columns[None, :] >= 1) & (columns[None, :] <= current[:, None] - 2)
        score = tl.load(scores_ptr + query[:, None] * num_columns + columns[None, :], mask=may, other=0.0)
        chosen = best(tl.where(may, score.to(tl.int32, bitcast=True), -1), keep, 31)
        near = (columns[None, :] == current[:, None]) | (columns[None, :] == current[:, None] - 1)
        chosen = (chosen & may) | (valid[:, None] & (near | (columns == 0)[None, :]))
        words += tl.sum(tl.where(chosen, 1 << query[:, None], 0), 0)
    tl.store(words_ptr + (head * num_tiles + tile) * num_columns + columns, words, mask=inside)
