"""The short convolution in Triton: one kernel forward, one back, for texts of any length.

Padding is stepped over by its rank: the kernels walk over the real tokens of a row in order, through a list of their
columns, and over the padding after them. Without padding a rank is a column.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kept import tables_of_bounds
from ..launch import launch
from .backward import gradients
from .eager import places_in_documents
from .tiles import FORWARD, Work, earlier, load_places, load_taps, load_text, real_tokens_first


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
    order, count = (None, None) if real is None else real_tokens_first(real)
    place = None if cu_seqlens is None else tables_of_bounds(places_in_documents, cu_seqlens, x.device, x.shape[1])
    y, after = _ShortConvolution.apply(
        x.flatten(2).contiguous(), taps, tail, order, count, place, activation == "silu", output_tail
    )
    return y.view(x.shape), after


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        taps: Tensor,
        tail: Tensor | None,
        order: Tensor | None,
        count: Tensor | None,
        place: Tensor | None,
        silu: bool,
        output_tail: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        taps = taps.contiguous()
        tail = tail if tail is None or tail.stride(-1) == 1 else tail.contiguous()
        ctx.save_for_backward(x, taps, tail, order, count, place)
        ctx.silu = silu
        batch, time, channels = x.shape
        num_taps = taps.shape[1]
        work = Work.of(FORWARD, "forward", x, num_taps)
        y = torch.empty_like(x)
        after = x.new_empty(batch, num_taps - 1, channels) if output_tail else None
        launch(
            _forward_kernel,
            work.grid,
            (
                x,
                taps,
                x if tail is None else tail,
                x if order is None else order,
                x if count is None else count,
                x if place is None else place,
                y,
                y if after is None else after,
            ),
            (time, work.chunks, work.steps, *((0, 0) if tail is None else tail.stride()[:2])),
            C=channels,
            N=num_taps,
            BLOCK_T=work.tokens,
            BLOCK_C=work.channels,
            BLOCK_N=triton.next_power_of_2(num_taps),
            SILU=silu,
            PADDED=order is not None,
            PACKED=place is not None,
            TAIL=tail is not None,
            AFTER=after is not None,
            num_warps=work.warps,
        )
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_after: Tensor | None) -> tuple[Tensor | None, ...]:
        x, taps, tail, order, count, place = ctx.saved_tensors
        dx, d_taps, d_tail = gradients(
            torch.zeros_like(x) if dy is None else dy.contiguous(),
            None if d_after is None else d_after.contiguous(),
            x,
            taps,
            tail,
            order,
            count,
            place,
            silu=ctx.silu,
            wanted=ctx.needs_input_grad[:3],
        )
        return dx, d_taps, d_tail, None, None, None, None, None


@triton.jit(do_not_specialize=["time", "chunks", "steps"])  # type: ignore[untyped-decorator]
def _forward_kernel(
    x_ptr,  # [B, T, C]
    taps_ptr,  # [C, N]
    tail_ptr,  # [B, N − 1, C]
    order_ptr,  # [B, T], columns of real tokens, then of padding
    count_ptr,  # [B], how many are real
    place_ptr,  # [T], places of a packed row's tokens in their documents
    y_ptr,  # [B, T, C]
    after_ptr,  # [B, N − 1, C]
    time,
    chunks,
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
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < C
    chunk = tl.program_id(0) // blocks % chunks
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)  # offsets pass 2**31 long before memory ends
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
