"""SwiGLU in Triton: one kernel forward and one back, which keep nothing but their inputs.

Gate and up are two pointers with a stride each, so that the halves of one projection, two projections and slices of a
wider one are all read where they lie; the gradient of one projection is written as one tensor.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import launch

VARIABLE = "HYBRIDIZE_SWIGLU"
"""Overrides the table: `forward=2048,1024,4;backward=1024,1024,4`, in the order of `Tile`'s fields."""

LEAST_COLUMNS = 256


@dataclass(frozen=True)
class Tile:
    """Numbers of a tile (rows times columns), its columns at most, warps of a program."""

    numbers: int
    columns: int
    warps: int


TILES = {"forward": Tile(2048, 1024, 4), "backward": Tile(1024, 1024, 4)}


@dataclass(frozen=True)
class Work:
    """Rows and columns of a tile, tiles, warps of each."""

    rows: int
    columns: int
    tiles: int
    warps: int


@lru_cache(maxsize=1024)
def work_of(name: str, rows: int, size: int, override: str | None) -> Work:
    """How `rows` rows of `size` numbers are shared out in the pass of this name."""
    tile = TILES[name]
    given = dict(part.split("=") for part in override.split(";")) if override else {}
    if name in given:
        tile = Tile(*map(int, given[name].split(",")))
    columns = _columns(size, tile.columns)
    tile_rows = max(1, min(tile.numbers // columns, int(triton.next_power_of_2(rows))))
    return Work(tile_rows, columns, triton.cdiv(rows, tile_rows) * triton.cdiv(size, columns), tile.warps)


def _columns(size: int, most: int) -> int:
    """Columns of a tile: without a rest where that is possible, else as wide as may be."""
    columns = most
    while columns > LEAST_COLUMNS and size % columns:
        columns //= 2
    return columns if size % columns == 0 else min(most, int(triton.next_power_of_2(size)))


def _work(name: str, rows: Tensor) -> Work:
    return work_of(name, *rows.shape, os.environ.get(VARIABLE))


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `hybridize_kernels.swiglu`."""
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


def _rows(x: Tensor) -> Tensor:
    """`[..., I]` -> `[N, I]` with the numbers of a row side by side: a view wherever it can be one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up as rows."""
    if up is not None:
        return _rows(gate), _rows(up)
    rows = _rows(gate)
    half = rows.shape[1] // 2
    return rows[:, :half], rows[:, half:]


def _stride(rows: Tensor) -> int:
    """From row to row; a single row may have any."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        return activate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        gate, up = ctx.saved_tensors
        d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        d_up = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
        differentiate(dy, (gate, up), (d_gate, d_up))
        return d_gate, d_up


def activate(gate: Tensor, up: Tensor | None) -> Tensor:
    """silu(gate) · up, of two tensors or of two halves."""
    gates, ups = _halves(gate, up)
    size = gates.shape[1]
    dtype = torch.promote_types(gates.dtype, ups.dtype)
    y = torch.empty(*gate.shape[:-1], size, dtype=dtype, device=gate.device)
    work = _work("forward", gates)
    launch(
        _forward_kernel,
        (work.tiles,),
        (gates, ups, y),
        (gates.shape[0],),
        SIZE=size,
        GATE_STRIDE=_stride(gates),
        UP_STRIDE=_stride(ups),
        BLOCK_N=work.rows,
        BLOCK_I=work.columns,
        num_warps=work.warps,
    )
    return y


def differentiate(
    dy: Tensor,
    inputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor, Tensor | None],
    activation: Tensor | None = None,
) -> None:
    """Writes the gradients of gate and up; and silu(gate) · up `[..., I]` once more, where there is room for it."""
    gates, ups = _halves(*inputs)
    d_gates, d_ups = _halves(*gradients)
    rows = _rows(dy)
    work = _work("backward", rows)
    launch(
        _backward_kernel,
        (work.tiles,),
        (rows, gates, ups, d_gates, d_ups, rows if activation is None else activation),
        (rows.shape[0],),
        SIZE=rows.shape[1],
        DY_STRIDE=_stride(rows),
        GATE_STRIDE=_stride(gates),
        UP_STRIDE=_stride(ups),
        D_STRIDE=_stride(d_gates),
        BLOCK_N=work.rows,
        BLOCK_I=work.columns,
        AGAIN=activation is not None,
        num_warps=work.warps,
    )


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward_kernel(
    gate_ptr,  # [N, I], rows GATE_STRIDE apart
    up_ptr,  # [N, I], rows UP_STRIDE apart
    y_ptr,  # [N, I]
    rows,
    SIZE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row, column, inside = _tile(rows, SIZE, BLOCK_N, BLOCK_I)
    gate = tl.load(gate_ptr + row * GATE_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * UP_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * SIZE + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward_kernel(
    dy_ptr,  # [N, I], rows DY_STRIDE apart
    gate_ptr,  # [N, I], rows GATE_STRIDE apart
    up_ptr,  # [N, I], rows UP_STRIDE apart
    d_gate_ptr,  # [N, I], rows D_STRIDE apart
    d_up_ptr,  # [N, I], rows D_STRIDE apart
    y_ptr,  # [N, I]
    rows,
    SIZE: tl.constexpr,
    DY_STRIDE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    D_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    AGAIN: tl.constexpr,
):
    row, column, inside = _tile(rows, SIZE, BLOCK_N, BLOCK_I)
    dy = tl.load(dy_ptr + row * DY_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * GATE_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * UP_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    silu = gate * opened
    d_gate = dy * up * (opened + silu * (1.0 - opened))
    at = row * D_STRIDE + column
    tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + at, (dy * silu).to(d_up_ptr.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(y_ptr + row * SIZE + column, (silu * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(rows, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr):
    """This program's rows [BLOCK_N, 1] (int64) and columns [1, BLOCK_I], and which of them there are."""
    across: tl.constexpr = (SIZE + BLOCK_I - 1) // BLOCK_I
    column = (tl.program_id(0) % across * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    row = ((tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    return row, column, (row < rows) & (column < SIZE)
