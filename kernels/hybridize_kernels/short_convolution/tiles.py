"""Tile sizes of the convolution's kernels, the order of a padded text, and the load that they share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VARIABLE = "HYBRIDIZE_SHORT_CONVOLUTION"
"""Overrides the table: `forward=1024,16,1,4224;backward=1024,16,1,4224`, in the order of `Tile`'s fields."""

LEAST_CHANNELS = 64
MAX_STEPS = 64


@dataclass(frozen=True)
class Tile:
    """Numbers of a tile (tokens times channels), bytes of its channels a thread, warps, and the programs to aim at."""

    numbers: int
    thread_bytes: int
    warps: int
    programs: int


# By taps at most. A warp is as wide as its channels, so that a thread owns whole columns of a tile and sums over time
# need no exchange; weights and sums take registers by taps and by channels of a thread.
FORWARD = {4: Tile(1024, 16, 1, 4224), 8: Tile(1024, 8, 1, 4224), 16: Tile(256, 4, 1, 4224)}
BACKWARD = {4: Tile(512, 8, 1, 4224), 8: Tile(256, 8, 1, 4224), 16: Tile(128, 4, 1, 4224)}
BACKWARD_SILU = {4: Tile(512, 16, 1, 4224), 8: Tile(128, 8, 1, 4224), 16: Tile(64, 4, 1, 4224)}
"""SiLU's argument is computed again for every tap: 2 n − 1 tiles of the text are held at once."""


TABLES = {"forward": FORWARD, "backward": BACKWARD, "backward_silu": BACKWARD_SILU}


class Work(NamedTuple):
    """How texts are shared out: a tile, `steps` of them a program, `chunks` programs along time and a grid of them."""

    tokens: int
    channels: int
    steps: int
    chunks: int
    grid: tuple[int]
    warps: int


class Places(NamedTuple):
    """Where tokens lie: what `real_tokens_first` gives of padding, places `[T]` in a packed row, or nothing."""

    order: Tensor | None
    real_tokens: Tensor | None
    place: Tensor | None


def of_three(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One to three tensors for the fixed places of a kernel's pointers."""
    first, second, third = (*tensors, tensors[0], tensors[0])[:3]
    return first, second, third


@lru_cache(maxsize=256)
def of_channels(channels: tuple[int, ...]) -> dict[str, int]:
    """The kernels' constants C0, C1 and C2; 0 where there is no text."""
    return {f"C{n}": channels[n] if n < len(channels) else 0 for n in range(3)}


def work_of(name: str, x: Tensor, channels: tuple[int, ...], taps: int, more_tokens: int = 0) -> Work:
    """For texts `[B, T, C]` of these channels and x's B, T and dtype, `more_tokens` longer than x is."""
    batch, time = x.shape[:2]
    return _work_of(name, batch, time, channels, x.element_size(), taps, more_tokens, os.environ.get(VARIABLE))


@lru_cache(maxsize=1024)
def _work_of(
    name: str,
    batch: int,
    time: int,
    channels: tuple[int, ...],
    number_bytes: int,
    taps: int,
    more_tokens: int,
    override: str | None,
) -> Work:
    table = TABLES[name]
    tile = table[min(most for most in table if most >= taps)]
    given = dict(part.split("=") for part in override.split(";")) if override else {}
    if values := given.get(name.split("_")[0]):
        tile = Tile(*map(int, values.split(",")))
    widest = max(LEAST_CHANNELS, 32 * tile.warps * tile.thread_bytes // number_bytes)
    block = min(channel_block(size, widest) for size in channels)
    tokens = max(1, tile.numbers // block)
    tiles = triton.cdiv(time + more_tokens, tokens)
    rows = batch * sum(triton.cdiv(size, block) for size in channels)
    steps = max(1, min(MAX_STEPS, rows * tiles // tile.programs))
    chunks = triton.cdiv(tiles, steps)
    return Work(tokens, block, steps, chunks, (rows * chunks,), tile.warps)


def channel_block(channels: int, most: int) -> int:
    """Channels of a tile: without a rest where that is possible."""
    block = most
    while block > LEAST_CHANNELS and channels % block:
        block //= 2
    # Where every size leaves a rest, as few tiles as can be.
    return block if channels % block == 0 else min(most, int(triton.next_power_of_2(channels)))


def real_tokens_first(real: Tensor) -> tuple[Tensor, Tensor]:
    """real `[B, T]` -> the columns `[B, T]` of real tokens in order, then those of padding; how many are real `[B]`.

    Both int32, and found without asking the device.
    """
    before = real.cumsum(dim=1)  # the token itself included
    count = before[:, -1:]
    column = torch.arange(real.shape[1], device=real.device)
    place = torch.where(real, before - 1, column - before + count)
    order = torch.empty(real.shape, dtype=torch.int32, device=real.device)
    order.scatter_(1, place, column.to(torch.int32).expand_as(order))
    return order, count[:, 0].to(torch.int32)


@triton.jit  # type: ignore[untyped-decorator]
def load_text(
    x_ptr,  # [T, C] of this row
    order_ptr,  # [T] of this row, columns of the real tokens first
    tail_ptr,  # [N − 1, C] of this row, the tokens of ranks 1 − N .. −1
    rank,  # [R], places among the real tokens
    end,  # how many real tokens there are
    tail_stride,
    channels,
    in_c,
    C: tl.constexpr,
    N: tl.constexpr,
    PADDED: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The real tokens of these ranks [R, BLOCK_C] in fp32, zero where there are none."""
    inside = (rank >= 0) & (rank < end)
    column = rank
    if PADDED:
        column = tl.load(order_ptr + rank, mask=inside, other=0)
    at = column.to(tl.int64)[:, None] * C + channels[None, :]
    x = tl.load(x_ptr + at, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)
    if TAIL:
        held = (rank < 0) & (rank >= 1 - N)
        at = (rank + (N - 1)).to(tl.int64)[:, None] * tail_stride + channels[None, :]
        x += tl.load(tail_ptr + at, mask=held[:, None] & in_c[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def load_places(place_ptr, rank, end):
    """How many tokens of its document come before each of these tokens [R] of a packed row."""
    return tl.load(place_ptr + rank, mask=(rank >= 0) & (rank < end), other=0)


@triton.jit  # type: ignore[untyped-decorator]
def earlier(rank, place, back, PACKED: tl.constexpr):
    """The ranks [R] of the tokens `back` before these; −1, where nothing is, if those are another document's."""
    source = rank - back
    if PACKED:
        source = tl.where(place >= back, source, -1)
    return source


@triton.jit  # type: ignore[untyped-decorator]
def load_taps(taps_ptr, channels, in_c, N: tl.constexpr):
    """N vectors [BLOCK_C] in fp32, the newest token's first."""
    weights = ()
    for back in tl.static_range(N):
        weight = tl.load(taps_ptr + channels * N + (N - 1 - back), mask=in_c, other=0.0)
        weights = weights + (weight.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return weights
