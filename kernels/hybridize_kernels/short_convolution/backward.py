"""The gradients of a short convolution: of the text a convolution the other way, of the taps sums over time.

Each program leaves its sums for itself, and they are added up in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .tiles import BACKWARD, BACKWARD_SILU, Work, earlier, load_places, load_taps, load_text


def gradients(
    dy: Tensor,
    d_after: Tensor | None,
    x: Tensor,
    taps: Tensor,
    tail: Tensor | None,
    order: Tensor | None,
    count: Tensor | None,
    place: Tensor | None,
    *,
    silu: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x `[B, T, C]`, taps `[C, n]` and tail `[B, n − 1, C]`, those that are wanted, each in its dtype.

    dy: `[B, T, C]`. d_after: `[B, n − 1, C]`, of the tail after the text, or None. order, count: as the kernels take
    them, None without padding; place: `[T]` of a packed row, else None.
    """
    batch, time, channels = x.shape
    num_taps = taps.shape[1]
    # The tokens of a tail are visited too: they are factors of the taps' gradients.
    more_tokens = 0 if tail is None else num_taps - 1
    work = Work.of(BACKWARD_SILU if silu else BACKWARD, "backward", x, num_taps, more_tokens)
    dx = torch.empty_like(x) if wanted[0] else None
    d_tail = None if tail is None else torch.empty(tail.shape, dtype=tail.dtype, device=tail.device)
    sums = x.new_empty(batch * work.chunks, channels, num_taps, dtype=torch.float32) if wanted[1] else None
    launch(
        _backward_kernel,
        work.grid,
        (
            dy,
            dy if d_after is None else d_after,
            x,
            taps,
            x if tail is None else tail,
            x if order is None else order,
            x if count is None else count,
            x if place is None else place,
            x if dx is None else dx,
            x if d_tail is None else d_tail,
            x if sums is None else sums,
        ),
        (time, work.chunks, work.steps, *((0, 0) if tail is None else tail.stride()[:2])),
        C=channels,
        N=num_taps,
        BLOCK_T=work.tokens,
        BLOCK_C=work.channels,
        SILU=silu,
        PADDED=order is not None,
        PACKED=place is not None,
        TAIL=tail is not None,
        AFTER=d_after is not None,
        TEXT_GRADIENT=dx is not None,
        TAPS_GRADIENT=sums is not None,
        num_warps=work.warps,
    )
    d_taps = None if sums is None else sums.sum(0).to(taps.dtype)
    return dx, d_taps, d_tail if wanted[2] else None


@triton.jit  # type: ignore[untyped-decorator]
def _load_gradient(dy_ptr, order_ptr, rank, end, channels, in_c, C: tl.constexpr, PADDED: tl.constexpr):
    """The outputs' gradient at these ranks [R, BLOCK_C] in fp32, zero where no real token is."""
    inside = (rank >= 0) & (rank < end)
    column = rank
    if PADDED:
        column = tl.load(order_ptr + rank, mask=inside, other=0)
    at = column.to(tl.int64)[:, None] * C + channels[None, :]
    return tl.load(dy_ptr + at, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["time", "chunks", "steps"])  # type: ignore[untyped-decorator]
def _backward_kernel(
    dy_ptr,  # [B, T, C]
    d_after_ptr,  # [B, N − 1, C]
    x_ptr,  # [B, T, C]
    taps_ptr,  # [C, N]
    tail_ptr,  # [B, N − 1, C]
    order_ptr,  # [B, T]
    count_ptr,  # [B]
    place_ptr,  # [T]
    dx_ptr,  # [B, T, C]
    d_tail_ptr,  # [B, N − 1, C]
    sums_ptr,  # [B · chunks, C, N]
    time,
    chunks,
    steps,
    tail_stride_b,
    tail_stride_t,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    TAIL: tl.constexpr,
    AFTER: tl.constexpr,
    TEXT_GRADIENT: tl.constexpr,
    TAPS_GRADIENT: tl.constexpr,
):
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    FIRST: tl.constexpr = 1 - N if TAIL else 0
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < C
    chunk = tl.program_id(0) // blocks % chunks
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    dy_ptr += row * time * C
    x_ptr += row * time * C
    dx_ptr += row * time * C
    order_ptr += row * time
    tail_ptr += row * tail_stride_b
    d_tail_ptr += row * (N - 1) * C
    d_after_ptr += row * (N - 1) * C
    end = time
    if PADDED:
        end = tl.load(count_ptr + row)
    weights = load_taps(taps_ptr, channels, in_c, N)
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros([BLOCK_C], dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005

    for step in range(chunk * steps, chunk * steps + steps):
        rank = FIRST + step * BLOCK_T + tl.arange(0, BLOCK_T)
        x = load_text(x_ptr, order_ptr, tail_ptr, rank, end, tail_stride_t, channels, in_c, C, N, PADDED, TAIL)
        dx = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
        added = ()
        for back in tl.static_range(N):
            # The token is `back` tokens old where this output reads it.
            later = rank + back
            place = later
            if PACKED:
                place = load_places(place_ptr, later, end)
                later = tl.where(place >= back, later, -1)  # another document's outputs do not read this token
            dz = _load_gradient(dy_ptr, order_ptr, later, end, channels, in_c, C, PADDED)
            if SILU:
                z = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
                for other in tl.static_range(N):
                    # Of equal distances the compiler loads one.
                    source = earlier(later, place, other, PACKED) if PACKED else rank + (back - other)
                    z += weights[other][None, :] * load_text(
                        x_ptr, order_ptr, tail_ptr, source, end, tail_stride_t, channels, in_c,
                        C, N, PADDED, TAIL,
                    )  # fmt: skip
                gate = tl.sigmoid(z)
                dz = dz * gate * (1.0 + z * (1.0 - gate))
            dx += weights[back][None, :] * dz
            added = added + (sums[back] + tl.sum(dz * x, axis=0),)  # type: ignore[assignment]  # noqa: RUF005
        sums = added
        if AFTER:
            slot = rank - end + (N - 1)
            held = (slot >= 0) & (slot < N - 1)
            at = slot.to(tl.int64)[:, None] * C + channels[None, :]
            dx += tl.load(d_after_ptr + at, mask=held[:, None] & in_c[None, :], other=0.0).to(tl.float32)
        if TEXT_GRADIENT:
            inside = (rank >= 0) & (rank < time)
            column = rank
            if PADDED:
                column = tl.load(order_ptr + rank, mask=inside, other=0)
            at = column.to(tl.int64)[:, None] * C + channels[None, :]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & in_c[None, :])
        if TAIL:
            at = (rank + (N - 1)).to(tl.int64)[:, None] * C + channels[None, :]
            tl.store(d_tail_ptr + at, dx.to(d_tail_ptr.dtype.element_ty), mask=(rank < 0)[:, None] & in_c[None, :])

    if TAPS_GRADIENT:
        place = (row * chunks + chunk) * C + channels
        for back in tl.static_range(N):
            tl.store(sums_ptr + place * N + (N - 1 - back), sums[back], mask=in_c)
