"""Tile sizes of the token scorer's kernels, and the loads and numbers that they share."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

VARIABLE = "HYBRIDIZE_TOKEN_SCORER_TILES"
"""Overrides the table: `convolution=128,64,8,3;weights=...;step=...`, in the order of `Tile`'s fields."""

LEAST = 16
"""A side of a matrix product's tile is at least this."""


@dataclass(frozen=True)
class Tile:
    """tokens, and input channels taken at a time; warps and stages of the kernel."""

    tokens: int
    channels: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Tiles of a convolution, the gradient of its inputs, the gradient of its weights, and the step of one token."""

    convolution: Tile
    inputs: Tile
    weights: Tile
    step: Tile = Tile(16, 64, 8, 4)


_HALF = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 3), Tile(64, 64, 4, 3)),
    256: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 3), Tile(64, 64, 8, 3)),
}
"""By padded output channels, for fp16 and bf16 products."""

_EXACT = {
    64: Tile(128, 64, 4, 2),
    128: Tile(128, 64, 8, 2),
    256: Tile(128, 32, 8, 2),
}
"""Of a convolution whose weight comes in three bf16 parts."""

_FLOAT = {
    64: Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 4, 2)),
    128: Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 4)),
}


@lru_cache(maxsize=256)
def tiles_for(outputs: int, dtype: torch.dtype, exact: bool, override: str | None) -> Tiles:
    """The tiles for a convolution to this many channels, with factors of this type.

    exact: of a weight in three bf16 parts. override: what the environment says.
    """
    size = max(64, padded(outputs))
    tiles = (_FLOAT if dtype == torch.float32 else _HALF)[size]
    if exact:
        tiles = replace(tiles, convolution=_EXACT[size])
    if override:
        given = dict(part.split("=") for part in override.split(";"))
        tiles = replace(tiles, **{name: Tile(*map(int, values.split(","))) for name, values in given.items()})
    return tiles


def tiles_override() -> str | None:
    """What `VARIABLE` says, asked for once a call."""
    return os.environ.get(VARIABLE)


@lru_cache(maxsize=256)
def padded(channels: int) -> int:
    """The width of a tile that holds so many channels."""
    width: int = max(LEAST, triton.next_power_of_2(channels))
    return width


@lru_cache(maxsize=256)
def channel_block(channels: int, most: int) -> int:
    """Channels taken at a time: without a rest where that is possible."""
    block = min(most, padded(channels))
    while block > LEAST and channels % block:
        block //= 2
    return block


@triton.jit  # type: ignore[untyped-decorator]
def silu(z):
    return z * tl.sigmoid(z)


@triton.jit  # type: ignore[untyped-decorator]
def _mixed(x):
    """A bijection of 32-bit numbers whose every output bit hangs on every input bit (constants: Wellons, lowbias32)."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit  # type: ignore[untyped-decorator]
def hashed_rows(seed_ptr, layer: tl.constexpr, rows):
    """One 32-bit number a row (64-bit indices) of the inputs of a layer, for `is_kept`."""
    seed = tl.load(seed_ptr)
    low = _mixed(rows.to(tl.uint32) ^ seed.to(tl.uint32))
    return _mixed(low + (rows >> 32).to(tl.uint32) + layer)


@triton.jit  # type: ignore[untyped-decorator]
def is_kept(row_hashes, channels, dropped):
    """Whether dropout keeps an element; `dropped` of 2**24 go. Row hashes and channels broadcast to the tile.

    A counter, not a stored mask: the backward pass draws the same numbers again.
    """
    drawn = _mixed(row_hashes ^ (channels.to(tl.uint32) * 0x1E3779B1))
    return (drawn >> 8).to(tl.int32) >= dropped


@triton.jit  # type: ignore[untyped-decorator]
def load_documents(start_ptr, end_ptr, times, time):
    """Where the document of each of these tokens [R] of a packed row begins and ends; nowhere past the row."""
    inside = times < time
    start = tl.load(start_ptr + times, mask=inside, other=0)
    return start, tl.load(end_ptr + times, mask=inside, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def add_taps(
    total,  # [BLOCK_T, BLOCK_N], fp32
    x_ptr,  # inputs of this row and head, from token `begin` on: offsets in a tile stay small
    x_stride,  # from a token to the next
    w_ptr,  # [KERNEL, WIDTH, W_WIDTH] from the first column that counts on; SPLITS of them, whose sum is the weight
    w_split_stride,
    begin,  # time of the tile's first token
    lower,  # inputs at lower <= time < upper are read, others are zero; numbers, or [BLOCK_T] by the output's time
    upper,
    dilation,
    left,  # tap i reads time + i · dilation − left
    history_ptr,  # [left, WIDTH] of this row, head and layer: inputs at negative times, a ring by position
    num_before,
    first_row,  # index of time 0 among the rows that dropout numbers
    seed_ptr,
    dropped,
    keep_scale,
    C: tl.constexpr,
    FIRST: tl.constexpr,  # these C channels are FIRST .. FIRST + C of the layer's WIDTH
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    W_WIDTH: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KERNEL: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    HISTORY: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """total + Σ_taps x[time of the tap] · W[tap]: a convolution over time as matrix products, nothing gathered."""
    columns = tl.arange(0, BLOCK_N)
    chunks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    for part in tl.range(0, KERNEL * chunks, num_stages=STAGES):
        tap = part // chunks
        channels = (part % chunks) * BLOCK_C + tl.arange(0, BLOCK_C)
        in_c = channels < C
        step = tl.arange(0, BLOCK_T) + tap * dilation - left
        source = begin + step
        inside = ((source >= lower) & (source < upper))[:, None]
        if C % BLOCK_C != 0:
            inside = inside & in_c[None, :]
        x = tl.load(x_ptr + step[:, None] * x_stride + channels[None, :], mask=inside, other=0.0)
        if ACTIVATE:
            x = silu(x.to(tl.float32))
        if HISTORY:
            slot = (num_before + source + left) % left
            stored = slot[:, None] * WIDTH + FIRST + channels[None, :]
            x = x.to(tl.float32)
            x += tl.load(history_ptr + stored, mask=(source < 0)[:, None] & in_c[None, :], other=0.0)
        if DROPOUT:
            hashes = hashed_rows(seed_ptr, LAYER, first_row + source)
            kept = is_kept(hashes[:, None], FIRST + channels[None, :], dropped)
            x = tl.where(kept, x.to(tl.float32) * keep_scale, 0.0)
        rows = (tap * WIDTH + FIRST + channels) * W_WIDTH
        inside = (columns < N)[None, :]
        if C % BLOCK_C != 0:
            inside = inside & in_c[:, None]
        x = x.to(COMPUTE)
        for split in tl.static_range(SPLITS):
            at = w_ptr + split * w_split_stride + rows[:, None] + columns[None, :]
            w = tl.load(at, mask=inside, other=0.0)
            total = tl.dot(x, w, total, input_precision=PRECISION)
    return total
