"""A few tokens of a short convolution as one Triton launch for several texts, their common tail updated in place.

A program owns some channels of one text of a row. It reads the tail and the tokens, and writes the tail when all of its
threads have read it; no other program looks at these channels. Texts may be parts of one projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import early_option, launch, launches_early
from .tiles import channel_block, of_channels, of_three

CHANNELS = 256
"""Of a program, at most; more channels leave processors idle at batch 1."""

WARPS = 2
VECTOR = 16
"""Numbers that are read at once, at most: the largest factor of the strides that is worth telling the compiler."""


def short_convolution_step(
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    tail: Tensor,
    real: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """See `hybridize_kernels.short_convolution_step`; for at most three texts of one dtype."""
    batch, time = xs[0].shape[:2]
    xs = [_rows_of_channels(x) for x in xs]
    early = launches_early(tail) and all(weight.is_contiguous() for weight in taps)  # a copy is made just before
    taps = [weight.contiguous() for weight in taps]
    ys = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs)
    channels = [weight.shape[0] for weight in taps]
    num_taps = taps[0].shape[1]
    block = min(channel_block(size, CHANNELS) for size in channels)
    blocks = sum(triton.cdiv(size, block) for size in channels)
    strides = [stride for x in of_three(xs) for stride in _strides(x)]
    unit = gcd(VECTOR, *strides)
    launch(
        _step_kernel,
        (batch * blocks,),
        (*of_three(xs), *of_three(taps), *of_three(ys), tail, xs[0] if real is None else real.contiguous()),
        (time, *(stride // unit for stride in strides)),
        **of_channels(tuple(channels)),
        UNIT=unit,
        N=num_taps,
        BLOCK_T=triton.next_power_of_2(time),
        BLOCK_N=triton.next_power_of_2(num_taps),
        BLOCK_C=block,
        SILU=activation == "silu",
        PADDED=real is not None,
        SINGLE=time == 1,
        EARLY=early,
        num_warps=WARPS,
        **early_option(early),
    )
    if not tail.is_inference():
        torch.autograd.graph.increment_version(tail)  # autograd does not see what a kernel writes
    return ys


def _rows_of_channels(x: Tensor) -> Tensor:
    """x `[B, T, H, D]` itself if a token's channels lie side by side, as in a share of a wider projection."""
    in_line = x.shape[2] == 1 or x.stride(2) == x.shape[3]
    return x if x.stride(3) == 1 and in_line else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    """How far apart rows and tokens lie; where there is only one, it does not matter."""
    row, token = (0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 1))
    return row, token


@triton.jit  # type: ignore[untyped-decorator]
def _load_token(
    x_ptr,  # [T, C] of this row, tokens x_token · UNIT apart
    tail_ptr,  # [N − 1, WIDTH] of this row, from this text's first channel on
    rank,  # [R]
    known,  # [R] bool
    columns,  # [BLOCK_T], place of a token among the real ones, or −1
    channels,
    in_c,
    x_token,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The real tokens of these ranks [R, BLOCK_C] in fp32, those below 0 from the tail."""
    column = rank
    if PADDED:
        # Where among the tokens of the step the one of this rank lies.
        same = columns[None, :] == rank[:, None]
        column = tl.sum(tl.where(same, tl.arange(0, BLOCK_T)[None, :], 0), axis=1)
    new = (known & (rank >= 0))[:, None] & in_c[None, :]
    at = column[:, None].to(tl.int64) * x_token * UNIT + channels[None, :]
    x = tl.load(x_ptr + at, mask=new, other=0.0).to(tl.float32)
    old = (known & (rank < 0))[:, None] & in_c[None, :]
    at = (rank + (N - 1))[:, None] * WIDTH + channels[None, :]
    return x + tl.load(tail_ptr + at, mask=old, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _load_all(ptr, mask, APART: tl.constexpr, COUNT: tl.constexpr):
    """COUNT vectors, their numbers APART from those of the one before."""
    vectors = ()
    for place in tl.static_range(COUNT):
        vectors += (tl.load(ptr + place * APART, mask=mask, other=0.0),)  # type: ignore[assignment]
    return vectors


@triton.jit  # type: ignore[untyped-decorator]
def _convolve_one(
    x_ptr,  # [B, 1, C], rows x_row · UNIT apart
    taps_ptr,  # [C, N]
    y_ptr,  # [B, 1, C]
    tail_ptr,  # [B, N − 1, WIDTH], from this text's first channel on
    real_ptr,  # [B, 1]
    row,
    block,
    x_row,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A step of one token, whose program reads everything once and at once."""
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < C
    tail_ptr += row * (N - 1) * WIDTH
    weights = _load_all(taps_ptr + channels * N, in_c, 1, N)
    text = _load_all(tail_ptr + channels, in_c, WIDTH, N - 1)
    if EARLY:
        tl.extra.cuda.gdc_wait()  # the taps and the tail do not hang on the kernel before this one
    text += (tl.load(x_ptr + row * x_row * UNIT + channels, mask=in_c, other=0.0),)
    there = in_c
    if PADDED:
        there = in_c & (tl.load(real_ptr + row).to(tl.int32) != 0)

    y = tl.zeros([BLOCK_C], dtype=tl.float32)
    for back in tl.static_range(N):
        y += weights[N - 1 - back].to(tl.float32) * text[N - 1 - back].to(tl.float32)
    if SILU:
        y = y * tl.sigmoid(y)
    if PADDED:
        y = tl.where(there, y, 0.0)
    tl.store(y_ptr + row * C + channels, y.to(y_ptr.dtype.element_ty), mask=in_c)
    tl.debug_barrier()  # all of the tail is read before any of it is written
    for place in tl.static_range(N - 1):
        moved = text[place + 1].to(tail_ptr.dtype.element_ty)
        tl.store(tail_ptr + place * WIDTH + channels, moved, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _convolve_several(
    x_ptr,  # [B, T, C], rows and tokens x_row · UNIT and x_token · UNIT apart
    taps_ptr,  # [C, N]
    y_ptr,  # [B, T, C]
    tail_ptr,  # [B, N − 1, WIDTH], from this text's first channel on
    real_ptr,  # [B, T]
    row,
    block,
    time,
    x_row,
    x_token,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < C
    t = tl.arange(0, BLOCK_T)
    x_ptr += row * x_row * UNIT
    y_ptr += row * time * C
    tail_ptr += row * (N - 1) * WIDTH
    is_real = t < time
    rank = t
    count = time
    if PADDED:
        is_real = tl.load(real_ptr + row * time + t, mask=t < time, other=0).to(tl.int32) != 0
        rank = tl.cumsum(is_real.to(tl.int32), axis=0) - 1
        count = tl.sum(is_real.to(tl.int32), axis=0)
    columns = tl.where(is_real, rank, -1)

    y = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for back in tl.static_range(N):
        weight = tl.load(taps_ptr + channels * N + (N - 1 - back), mask=in_c, other=0.0).to(tl.float32)
        y += weight[None, :] * _load_token(
            x_ptr, tail_ptr, rank - back, is_real, columns, channels, in_c, x_token, UNIT, WIDTH, N, BLOCK_T, PADDED
        )
    if SILU:
        y = y * tl.sigmoid(y)
    at = t[:, None] * C + channels[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(t < time)[:, None] & in_c[None, :])

    slot = tl.arange(0, BLOCK_N)
    held = slot < N - 1
    after = _load_token(
        x_ptr, tail_ptr, slot + count - (N - 1), held, columns, channels, in_c, x_token, UNIT, WIDTH, N, BLOCK_T, PADDED
    )
    tl.debug_barrier()  # all of the tail is read before any of it is written
    at = slot[:, None] * WIDTH + channels[None, :]
    tl.store(tail_ptr + at, after.to(tail_ptr.dtype.element_ty), mask=held[:, None] & in_c[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _convolve(
    x_ptr,
    taps_ptr,
    y_ptr,
    tail_ptr,
    real_ptr,
    row,
    block,
    time,
    x_row,
    x_token,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    SINGLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    if SINGLE:
        _convolve_one(
            x_ptr, taps_ptr, y_ptr, tail_ptr, real_ptr, row, block, x_row,
            C, UNIT, WIDTH, N, BLOCK_C, SILU, PADDED, EARLY,
        )  # fmt: skip
    else:
        _convolve_several(
            x_ptr, taps_ptr, y_ptr, tail_ptr, real_ptr, row, block, time, x_row, x_token,
            C, UNIT, WIDTH, N, BLOCK_T, BLOCK_N, BLOCK_C, SILU, PADDED, EARLY,
        )  # fmt: skip


STRIDES = [f"x{text}_{of}" for text in range(3) for of in ("row", "token")]


@triton.jit(do_not_specialize=["time", *STRIDES])  # type: ignore[untyped-decorator]
def _step_kernel(
    x0_ptr,  # [B, T, C0], with strides of rows and tokens in units of UNIT numbers
    x1_ptr,
    x2_ptr,
    taps0_ptr,  # [C0, N]
    taps1_ptr,
    taps2_ptr,
    y0_ptr,  # [B, T, C0]
    y1_ptr,
    y2_ptr,
    tail_ptr,  # [B, N − 1, C0 + C1 + C2]
    real_ptr,  # [B, T]
    time,
    x0_row,
    x0_token,
    x1_row,
    x1_token,
    x2_row,
    x2_token,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    SINGLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    blocks0: tl.constexpr = (C0 + BLOCK_C - 1) // BLOCK_C
    blocks1: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    blocks2: tl.constexpr = (C2 + BLOCK_C - 1) // BLOCK_C
    blocks: tl.constexpr = blocks0 + blocks1 + blocks2
    WIDTH: tl.constexpr = C0 + C1 + C2
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    if block < blocks0:
        _convolve(
            x0_ptr, taps0_ptr, y0_ptr, tail_ptr, real_ptr, row, block, time, x0_row, x0_token,
            C0, UNIT, WIDTH, N, BLOCK_T, BLOCK_N, BLOCK_C, SILU, PADDED, SINGLE, EARLY,
        )  # fmt: skip
    elif block < blocks0 + blocks1:
        _convolve(
            x1_ptr, taps1_ptr, y1_ptr, tail_ptr + C0, real_ptr, row, block - blocks0, time, x1_row, x1_token,
            C1, UNIT, WIDTH, N, BLOCK_T, BLOCK_N, BLOCK_C, SILU, PADDED, SINGLE, EARLY,
        )  # fmt: skip
    else:
        _convolve(
            x2_ptr, taps2_ptr, y2_ptr, tail_ptr + (C0 + C1), real_ptr, row, block - (blocks0 + blocks1), time,
            x2_row, x2_token, C2, UNIT, WIDTH, N, BLOCK_T, BLOCK_N, BLOCK_C, SILU, PADDED, SINGLE, EARLY,
        )  # fmt: skip
