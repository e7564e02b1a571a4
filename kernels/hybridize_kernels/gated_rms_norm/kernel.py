"""The gated RMSNorm in Triton: one kernel forward, one back that keeps nothing but the inputs.

A program owns one head and a part of the tokens, so that its scale is loaded once and the scale's gradient stays in
registers until the end. Each program leaves its sum for itself, and they are added up in a fixed order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import launch

VARIABLE = "HYBRIDIZE_GATED_RMS_NORM"
"""Overrides the table: `forward=2048,4,4224;backward=2048,4,2112`, in the order of `Tile`'s fields."""


@dataclass(frozen=True)
class Tile:
    """Numbers of a tile (tokens times padded head size), warps of a program, and the programs to aim at."""

    numbers: int
    warps: int
    programs: int


TABLE = {"forward": Tile(2048, 4, 4224), "backward": Tile(2048, 4, 2112)}
MAX_STEPS = 64


class Work(NamedTuple):
    """Tokens of a tile, padded head size, tiles of a program, programs along the tokens of a head, warps of each."""

    tokens: int
    block: int
    steps: int
    chunks: int
    warps: int


@lru_cache(maxsize=1024)
def work_of(name: str, tokens: int, heads: int, head_size: int, override: str | None) -> Work:
    """How the heads of so many tokens are shared out in the pass of this name."""
    tile = TABLE[name]
    given = dict(part.split("=") for part in override.split(";")) if override else {}
    if name in given:
        tile = Tile(*map(int, given[name].split(",")))
    block = int(triton.next_power_of_2(head_size))
    tile_tokens = max(1, min(tile.numbers // block, int(triton.next_power_of_2(tokens))))
    tiles = triton.cdiv(tokens, tile_tokens)
    steps = max(1, min(MAX_STEPS, tiles * heads // tile.programs))
    return Work(tile_tokens, block, steps, triton.cdiv(tiles, steps), tile.warps)


def gated_rms_norm(x: Tensor, scale: Tensor, gate: Tensor | None = None, *, epsilon: float | None = 1e-6) -> Tensor:
    """See `hybridize_kernels.gated_rms_norm`."""
    y: Tensor = _GatedRMSNorm.apply(x, scale, gate, epsilon)
    return y


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, gate: Tensor | None, epsilon: float | None) -> Tensor:
        x, scale = x.contiguous(), scale.contiguous()
        gate = None if gate is None else gate.contiguous()
        ctx.save_for_backward(x, scale, gate)
        ctx.epsilon = epsilon
        batch, time, heads, head_size = x.shape
        work = work_of("forward", batch * time, heads, head_size, os.environ.get(VARIABLE))
        y = torch.empty_like(x)
        launch(
            _forward_kernel,
            (work.chunks * heads,),
            (x, scale, x if gate is None else gate, y),
            (batch * time, work.steps, 0.0 if epsilon is None else float(epsilon)),
            H=heads,
            D=head_size,
            BLOCK_T=work.tokens,
            BLOCK_D=work.block,
            NORM=epsilon is not None,
            GATE=gate is not None,
            num_warps=work.warps,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, gate = ctx.saved_tensors
        batch, time, heads, head_size = x.shape
        work = work_of("backward", batch * time, heads, head_size, os.environ.get(VARIABLE))
        dx = torch.empty_like(x)
        d_gate = None if gate is None else torch.empty_like(gate)
        sums = torch.empty(work.chunks, heads, head_size, dtype=torch.float32, device=x.device)
        launch(
            _backward_kernel,
            (work.chunks * heads,),
            (dy.contiguous(), x, scale, x if gate is None else gate, dx, dx if d_gate is None else d_gate, sums),
            (batch * time, work.steps, 0.0 if ctx.epsilon is None else float(ctx.epsilon)),
            H=heads,
            D=head_size,
            BLOCK_T=work.tokens,
            BLOCK_D=work.block,
            NORM=ctx.epsilon is not None,
            GATE=gate is not None,
            num_warps=work.warps,
        )
        return dx, sums.sum(0).to(scale.dtype) if ctx.needs_input_grad[1] else None, d_gate, None


@triton.jit(do_not_specialize=["rows", "steps", "epsilon"])  # type: ignore[untyped-decorator]
def _forward_kernel(
    x_ptr,  # [rows, H, D]
    scale_ptr,  # [H, D]
    gate_ptr,  # [rows, H, D]
    y_ptr,
    rows,  # B · T
    steps,
    epsilon,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
):
    head = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    columns = tl.arange(0, BLOCK_D)
    in_d = columns < D
    scale = tl.load(scale_ptr + head * D + columns, mask=in_d, other=0.0).to(tl.float32)
    for step in range(chunk * steps, chunk * steps + steps):
        row = step * BLOCK_T + tl.arange(0, BLOCK_T)
        at = row.to(tl.int64)[:, None] * (H * D) + (head * D + columns)[None, :]  # passes 2**31 before memory ends
        inside = (row < rows)[:, None] & in_d[None, :]
        y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            y = y * tl.rsqrt(tl.sum(y * y, axis=1) * (1.0 / D) + epsilon)[:, None]
        y = y * scale[None, :]
        if GATE:
            y = y * (2.0 * tl.sigmoid(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)))
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps", "epsilon"])  # type: ignore[untyped-decorator]
def _backward_kernel(
    dy_ptr,  # [rows, H, D]
    x_ptr,
    scale_ptr,  # [H, D]
    gate_ptr,  # [rows, H, D]
    dx_ptr,
    d_gate_ptr,
    sums_ptr,  # [chunks, H, D]
    rows,  # B · T
    steps,
    epsilon,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
):
    head = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    columns = tl.arange(0, BLOCK_D)
    in_d = columns < D
    scale = tl.load(scale_ptr + head * D + columns, mask=in_d, other=0.0).to(tl.float32)
    d_scale = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for step in range(chunk * steps, chunk * steps + steps):
        row = step * BLOCK_T + tl.arange(0, BLOCK_T)
        at = row.to(tl.int64)[:, None] * (H * D) + (head * D + columns)[None, :]
        inside = (row < rows)[:, None] & in_d[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            inverse = tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / D) + epsilon)
            x = x * inverse[:, None]
        if GATE:
            opened = tl.sigmoid(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32))
            # d(2 sigmoid) = 2 sigmoid · (1 − sigmoid), and 2 sigmoid goes into dy.
            dy = dy * (2.0 * opened)
            d_gate = dy * x * scale[None, :] * (1.0 - opened)
            tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
        d_scale += dy * x
        dx = dy * scale[None, :]
        if NORM:
            dx = (dx - x * (tl.sum(dx * x, axis=1) * (1.0 / D))[:, None]) * inverse[:, None]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    place = (chunk * H + head) * D + columns
    tl.store(sums_ptr + place, tl.sum(d_scale, axis=0), mask=in_d)
