"""The gradients of short convolutions: of a text a convolution the other way, of the taps sums over time.

Each program leaves its sums for itself, and they are added up in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .tiles import Places, earlier, load_places, load_taps, load_text, of_channels, of_three, work_of


def gradients(
    dys: Sequence[Tensor | None],
    d_after: Tensor | None,
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    tail: Tensor | None,
    places: Places,
    *,
    silu: bool,
    text_wanted: Sequence[bool],
    taps_wanted: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """Gradients of the texts `[B, T, H, D]`, their taps `[C, n]` and the tail `[B, n − 1, C]`, each in its dtype.

    dys: as the texts, None where there is none. d_after: `[B, n − 1, C]`, of the tail after the text, or None.
    """
    x = xs[0]
    channels = tuple(weight.shape[0] for weight in taps)
    num_taps = taps[0].shape[1]
    # The tokens of a tail are visited too: they are factors of the taps' gradients.
    more_tokens = 0 if tail is None else num_taps - 1
    work = work_of("backward_silu" if silu else "backward", x, channels, num_taps, more_tokens)
    dxs = [torch.empty_like(x) for x in xs] if any(text_wanted) else None
    d_tail = None if tail is None else torch.empty(tail.shape, dtype=tail.dtype, device=tail.device)
    sums = None
    if any(taps_wanted):
        shape = (x.shape[0] * work.chunks, sum(channels), num_taps)
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    given = [
        torch.zeros_like(x) if dy is None else dy if dy.is_contiguous() else dy.contiguous()
        for x, dy in zip(xs, dys, strict=True)
    ]
    d_after = None if d_after is None else d_after.contiguous()
    launch(
        _backward_kernel,
        work.grid,
        (
            *of_three(given),
            *of_three(xs),
            *of_three(taps),
            *of_three(xs if dxs is None else dxs),
            *(x if table is None else table for table in (tail, *places, d_after, d_tail, sums)),
        ),
        (x.shape[1], work.chunks, work.steps, *((0, 0) if tail is None else tail.stride()[:2])),
        **of_channels(channels),
        N=num_taps,
        BLOCK_T=work.tokens,
        BLOCK_C=work.channels,
        SILU=silu,
        PADDED=places.order is not None,
        PACKED=places.place is not None,
        TAIL=tail is not None,
        AFTER=d_after is not None,
        TEXT_GRADIENT=dxs is not None,
        TAPS_GRADIENT=sums is not None,
        num_warps=work.warps,
    )
    return (
        [dxs[n] if dxs is not None and wanted else None for n, wanted in enumerate(text_wanted)],
        _of_taps(sums, taps, taps_wanted),
        d_tail,
    )


def _of_taps(sums: Tensor | None, taps: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The sum `[C, n]` over the programs, in parts and in the dtypes of the taps."""
    if sums is None:
        return [None] * len(taps)
    total = sums.sum(0)
    parts = total.split([weight.shape[0] for weight in taps]) if len(taps) > 1 else [total]
    return [part.to(weight.dtype) if needed else None for part, weight, needed in zip(parts, taps, wanted, strict=True)]


@triton.jit  # type: ignore[untyped-decorator]
def _load_gradient(dy_ptr, order_ptr, rank, end, channels, in_c, C: tl.constexpr, PADDED: tl.constexpr):
    """The outputs' gradient at these ranks [R, BLOCK_C] in fp32, zero where no real token is."""
    inside = (rank >= 0) & (rank < end)
    column = rank
    if PADDED:
        column = tl.load(order_ptr + rank, mask=inside, other=0)
    at = column.to(tl.int64)[:, None] * C + channels[None, :]
    return tl.load(dy_ptr + at, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients_of_text(
    dy_ptr,  # [B, T, C]
    x_ptr,  # [B, T, C]
    taps_ptr,  # [C, N]
    dx_ptr,  # [B, T, C]
    tail_ptr,  # [B, N − 1, C]
    order_ptr,  # [B, T]
    count_ptr,  # [B]
    place_ptr,  # [T]
    d_after_ptr,  # [B, N − 1, C]
    d_tail_ptr,  # [B, N − 1, C]
    sums_ptr,  # [C, N] of this program's row and chunk
    row,  # int64
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
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    TAIL: tl.constexpr,
    AFTER: tl.constexpr,
    TEXT_GRADIENT: tl.constexpr,
    TAPS_GRADIENT: tl.constexpr,
):
    FIRST: tl.constexpr = 1 - N if TAIL else 0
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < C
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
        for back in tl.static_range(N):
            tl.store(sums_ptr + channels * N + (N - 1 - back), sums[back], mask=in_c)


@triton.jit(do_not_specialize=["time", "chunks", "steps"])  # type: ignore[untyped-decorator]
def _backward_kernel(
    dy0_ptr,  # [B, T, C0]
    dy1_ptr,
    dy2_ptr,
    x0_ptr,  # [B, T, C0]
    x1_ptr,
    x2_ptr,
    taps0_ptr,  # [C0, N]
    taps1_ptr,
    taps2_ptr,
    dx0_ptr,  # [B, T, C0]
    dx1_ptr,
    dx2_ptr,
    tail_ptr,  # [B, N − 1, C0]
    order_ptr,
    count_ptr,
    place_ptr,
    d_after_ptr,  # [B, N − 1, C0]
    d_tail_ptr,  # [B, N − 1, C0]
    sums_ptr,  # [B · chunks, C0 + C1 + C2, N]
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
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    TAIL: tl.constexpr,
    AFTER: tl.constexpr,
    TEXT_GRADIENT: tl.constexpr,
    TAPS_GRADIENT: tl.constexpr,
):
    blocks0: tl.constexpr = (C0 + BLOCK_C - 1) // BLOCK_C
    blocks1: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    blocks: tl.constexpr = blocks0 + blocks1 + (C2 + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    if TAPS_GRADIENT:
        sums_ptr += (row * chunks + chunk) * ((C0 + C1 + C2) * N)
    if block < blocks0:
        _gradients_of_text(
            dy0_ptr, x0_ptr, taps0_ptr, dx0_ptr, tail_ptr, order_ptr, count_ptr, place_ptr,
            d_after_ptr, d_tail_ptr, sums_ptr, row, chunk, block, time, steps, tail_stride_b, tail_stride_t,
            C0, N, BLOCK_T, BLOCK_C, SILU, PADDED, PACKED, TAIL, AFTER, TEXT_GRADIENT, TAPS_GRADIENT,
        )  # fmt: skip
    if C1 > 0:  # noqa: SIM102  # what is known when compiling stands apart: no code for texts that are not there
        if (block >= blocks0) & (block < blocks0 + blocks1):
            _gradients_of_text(
                dy1_ptr, x1_ptr, taps1_ptr, dx1_ptr, tail_ptr, order_ptr, count_ptr, place_ptr,
                d_after_ptr, d_tail_ptr, sums_ptr + C0 * N, row, chunk, block - blocks0, time, steps,
                tail_stride_b, tail_stride_t,
                C1, N, BLOCK_T, BLOCK_C, SILU, PADDED, PACKED, False, False, TEXT_GRADIENT, TAPS_GRADIENT,
            )  # fmt: skip
    if C2 > 0:  # noqa: SIM102
        if block >= blocks0 + blocks1:
            _gradients_of_text(
                dy2_ptr, x2_ptr, taps2_ptr, dx2_ptr, tail_ptr, order_ptr, count_ptr, place_ptr,
                d_after_ptr, d_tail_ptr, sums_ptr + (C0 + C1) * N, row, chunk, block - (blocks0 + blocks1), time, steps,
                tail_stride_b, tail_stride_t,
                C2, N, BLOCK_T, BLOCK_C, SILU, PADDED, PACKED, False, False, TEXT_GRADIENT, TAPS_GRADIENT,
            )  # fmt: skip
