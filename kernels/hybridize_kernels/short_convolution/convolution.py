"""The short convolution in Triton: one kernel forward, one back, for up to three texts of any length.

Padding is stepped over by its rank: the kernels walk over the real tokens of a row in order, through a list of their
columns, and over the padding after them. Without padding a rank is a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kept import tables_of_bounds
from ..launch import launch
from .backward import gradients
from .eager import places_in_documents
from .tiles import (
    Places,
    earlier,
    load_places,
    load_taps,
    load_text,
    of_channels,
    of_three,
    real_tokens_first,
    work_of,
)


def short_convolution(
    x: Tensor,
    taps: Tensor,
    *,
    tail: Tensor | None = None,
    real: Tensor | None = None,
    activation: str | None = None,
    output_tail: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `hybridize_kernels.short_convolution`."""
    places = _places(x, real, cu_seqlens)
    after, y = _ShortConvolutions.apply(tail, places, _Call(1, activation == "silu", output_tail), x, taps)
    return y, after


def short_convolutions(
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    *,
    real: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `hybridize_kernels.short_convolutions`; for at most three texts of one dtype."""
    places = _places(xs[0], real, cu_seqlens)
    _, *ys = _ShortConvolutions.apply(None, places, _Call(len(xs), activation == "silu", False), *xs, *taps)
    return tuple(ys)


def _places(x: Tensor, real: Tensor | None, cu_seqlens: Tensor | None) -> Places:
    if real is not None:
        return Places(*real_tokens_first(real), None)
    if cu_seqlens is not None:
        return Places(None, None, tables_of_bounds(places_in_documents, cu_seqlens, x.device, x.shape[1]))
    return Places(None, None, None)


class _Call(NamedTuple):
    """What autograd does not see."""

    texts: int
    silu: bool
    output_tail: bool


class _ShortConvolutions(torch.autograd.Function):
    """Of texts `[B, T, H, D]`, then as many taps; a tail belongs to a single text. Gives tail and outputs."""

    @staticmethod
    def forward(
        ctx: Any, tail: Tensor | None, places: Places, call: _Call, *texts_and_taps: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        tail = tail if tail is None or tail.stride(-1) == 1 else tail.contiguous()
        tensors = [x if x.is_contiguous() else x.contiguous() for x in texts_and_taps]
        xs, taps = tensors[: call.texts], tensors[call.texts :]
        ctx.save_for_backward(tail, *tensors)
        # Nobody changes the tables of a call.
        ctx.places, ctx.call = places, call
        x = xs[0]
        channels = tuple(weight.shape[0] for weight in taps)
        num_taps = taps[0].shape[1]
        work = work_of("forward", x, channels, num_taps)
        ys = [torch.empty_like(x) for x in xs]
        after = x.new_empty(x.shape[0], num_taps - 1, channels[0]) if call.output_tail else None
        launch(
            _forward_kernel,
            work.grid,
            (
                *of_three(xs),
                *of_three(taps),
                *of_three(ys),
                *(x if table is None else table for table in (tail, *places)),
                x if after is None else after,
            ),
            (x.shape[1], work.chunks, work.steps, *((0, 0) if tail is None else tail.stride()[:2])),
            **of_channels(channels),
            N=num_taps,
            BLOCK_T=work.tokens,
            BLOCK_C=work.channels,
            BLOCK_N=triton.next_power_of_2(num_taps),
            SILU=call.silu,
            PADDED=places.order is not None,
            PACKED=places.place is not None,
            TAIL=tail is not None,
            AFTER=after is not None,
            num_warps=work.warps,
        )
        return after, *ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_after: Tensor | None, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        tail, *tensors = ctx.saved_tensors
        texts = ctx.call.texts
        wanted = ctx.needs_input_grad
        dxs, d_taps, d_tail = gradients(
            dys,
            d_after,
            tensors[:texts],
            tensors[texts:],
            tail,
            ctx.places,
            silu=ctx.call.silu,
            text_wanted=wanted[3 : 3 + texts],
            taps_wanted=wanted[3 + texts :],
        )
        return d_tail if wanted[0] else None, None, None, *dxs, *d_taps


@triton.jit  # type: ignore[untyped-decorator]
def _convolve_text(
    x_ptr,  # [B, T, C]
    taps_ptr,  # [C, N]
    tail_ptr,  # [B, N − 1, C]
    order_ptr,  # [B, T], columns of real tokens, then of padding
    count_ptr,  # [B], how many are real
    place_ptr,  # [T], places of a packed row's tokens in their documents
    y_ptr,  # [B, T, C]
    after_ptr,  # [B, N − 1, C]
    row,  # int64: offsets pass 2**31 long before memory ends
    chunk,
    block,  # of channels
    time,
    steps,
    tail_stride_b,
    tail_stride_t,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    TAIL: tl.constexpr,
    AFTER: tl.constexpr,
):
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < C
    x_ptr += row * time * C
    y_ptr += row * time * C
    order_ptr += row * time
    tail_ptr += row * tail_stride_b
    end = time
    if PADDED:
        end = tl.load(count_ptr + row)
    weights = load_taps(taps_ptr, channels, in_c, N)

    for step in range(chunk * steps, chunk * steps + steps):
        rank = step * BLOCK_T + tl.arange(0, BLOCK_T)
        place = rank
        if PACKED:
            place = load_places(place_ptr, rank, end)
        y = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
        for back in tl.static_range(N):
            source = earlier(rank, place, back, PACKED)
            y += weights[back][None, :] * load_text(
                x_ptr, order_ptr, tail_ptr, source, end, tail_stride_t, channels, in_c, C, N, PADDED, TAIL
            )
        if SILU:
            y = y * tl.sigmoid(y)
        inside = rank < time
        column = rank
        if PADDED:
            column = tl.load(order_ptr + rank, mask=inside, other=0)
            y = tl.where((rank < end)[:, None], y, 0.0)
        at = column.to(tl.int64)[:, None] * C + channels[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & in_c[None, :])

    if AFTER and chunk == 0:
        slot = tl.arange(0, BLOCK_N)
        rank = end - (N - 1) + slot
        x = load_text(x_ptr, order_ptr, tail_ptr, rank, end, tail_stride_t, channels, in_c, C, N, PADDED, TAIL)
        at = (row * (N - 1) + slot)[:, None] * C + channels[None, :]
        tl.store(after_ptr + at, x.to(after_ptr.dtype.element_ty), mask=(slot < N - 1)[:, None] & in_c[None, :])


@triton.jit(do_not_specialize=["time", "chunks", "steps"])  # type: ignore[untyped-decorator]
def _forward_kernel(
    x0_ptr,  # [B, T, C0]
    x1_ptr,
    x2_ptr,
    taps0_ptr,  # [C0, N]
    taps1_ptr,
    taps2_ptr,
    y0_ptr,  # [B, T, C0]
    y1_ptr,
    y2_ptr,
    tail_ptr,  # [B, N − 1, C0]
    order_ptr,
    count_ptr,
    place_ptr,
    after_ptr,  # [B, N − 1, C0]
    time,
    chunks,
    steps,
    tail_stride_b,
    tail_stride_t,
    C0: tl.constexpr,
    C1: tl.constexpr,  # 0 where there is no such text
    C2: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    TAIL: tl.constexpr,
    AFTER: tl.constexpr,
):
    blocks0: tl.constexpr = (C0 + BLOCK_C - 1) // BLOCK_C
    blocks1: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    blocks: tl.constexpr = blocks0 + blocks1 + (C2 + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    if block < blocks0:
        _convolve_text(
            x0_ptr, taps0_ptr, tail_ptr, order_ptr, count_ptr, place_ptr, y0_ptr, after_ptr,
            row, chunk, block, time, steps, tail_stride_b, tail_stride_t,
            C0, N, BLOCK_T, BLOCK_C, BLOCK_N, SILU, PADDED, PACKED, TAIL, AFTER,
        )  # fmt: skip
    if C1 > 0:  # noqa: SIM102  # what is known when compiling stands apart: no code for texts that are not there
        if (block >= blocks0) & (block < blocks0 + blocks1):
            _convolve_text(
                x1_ptr, taps1_ptr, tail_ptr, order_ptr, count_ptr, place_ptr, y1_ptr, after_ptr,
                row, chunk, block - blocks0, time, steps, tail_stride_b, tail_stride_t,
                C1, N, BLOCK_T, BLOCK_C, BLOCK_N, SILU, PADDED, PACKED, False, False,
            )  # fmt: skip
    if C2 > 0:  # noqa: SIM102
        if block >= blocks0 + blocks1:
            _convolve_text(
                x2_ptr, taps2_ptr, tail_ptr, order_ptr, count_ptr, place_ptr, y2_ptr, after_ptr,
                row, chunk, block - (blocks0 + blocks1), time, steps, tail_stride_b, tail_stride_t,
                C2, N, BLOCK_T, BLOCK_C, BLOCK_N, SILU, PADDED, PACKED, False, False,
            )  # fmt: skip
