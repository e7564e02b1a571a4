"""RMSNorm in Triton: one kernel forward, one back, with the residual stream's sum and the sum of its gradients inside.

A program walks over tiles of whole rows with the weight in registers. Kept for the backward pass are the rows that
were normalised, which the residual stream keeps anyway, and one fp32 number a row. The weight's gradient stays in
registers until a program ends; each leaves its sum for itself, and they are added up in a fixed order.
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

VARIABLE = "HYBRIDIZE_RMS_NORM"
"""Overrides the tables: `forward=2048,4,4224;backward=2048,4,4224;trained=2048,4,528`, in the order of `Tile`."""


@dataclass(frozen=True)
class Tile:
    """Numbers of a tile (rows times padded size), never less than a row; warps of a program; programs at most."""

    numbers: int
    warps: int
    programs: int


# By the padded size of a row at most. `trained` is the backward pass that also gives the weight's gradient: each of
# its programs leaves a row of sums, so there are no more of them than an H100 runs side by side.
TABLES = {
    "forward": {2048: Tile(2048, 4, 4224), 4096: Tile(4096, 8, 2112), 16384: Tile(8192, 16, 1056)},
    "backward": {
        2048: Tile(2048, 4, 4224),
        4096: Tile(4096, 8, 2112),
        8192: Tile(8192, 16, 1056),
        16384: Tile(16384, 32, 528),
    },
    "trained": {
        2048: Tile(2048, 4, 528),
        4096: Tile(4096, 8, 264),
        8192: Tile(8192, 16, 132),
        16384: Tile(16384, 32, 132),
    },
}


@dataclass(frozen=True)
class Work:
    """Rows of a tile, padded size of a row, tiles of a program, programs, warps of each."""

    rows: int
    block: int
    steps: int
    programs: int
    warps: int


def rms_norm(
    x: Tensor, weight: Tensor, *, epsilon: float, residual: Tensor | None = None, return_sum: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See `hybridize_kernels.rms_norm`."""
    result: Tensor | tuple[Tensor, Tensor] = _RMSNorm.apply(x, weight, residual, float(epsilon), return_sum)
    return result


@lru_cache(maxsize=1024)
def work_of(name: str, rows: int, size: int, override: str | None) -> Work:
    """How `rows` rows of `size` numbers are shared out in the pass of this name."""
    block = int(triton.next_power_of_2(size))
    table = TABLES[name]
    tile = table[min(most for most in table if most >= block)]
    given = dict(part.split("=") for part in override.split(";")) if override else {}
    if name in given:
        tile = Tile(*map(int, given[name].split(",")))
    tile_rows = max(1, min(tile.numbers // block, int(triton.next_power_of_2(rows))))
    tiles = triton.cdiv(rows, tile_rows)
    steps = triton.cdiv(tiles, tile.programs)
    return Work(tile_rows, block, steps, triton.cdiv(tiles, steps), tile.warps)


def _work(name: str, rows: Tensor) -> Work:
    return work_of(name, *rows.shape, os.environ.get(VARIABLE))


def _rows(x: Tensor) -> Tensor:
    """`[..., D]` -> `[N, D]` with the numbers of a row side by side: a view wherever it can be one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _stride(rows: Tensor) -> int:
    """From row to row; a single row may have any."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, epsilon: float, return_sum: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        weight = weight.contiguous()
        y, s, inverse = normalise(x, weight, epsilon, residual)
        ctx.save_for_backward(s, weight, inverse)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, None if residual is None else residual.dtype)
        if residual is not None:
            return y, s
        return (y, x) if return_sum else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        d_sum, d_weight = ds, None
        if dy is not None:
            s, weight, inverse = ctx.saved_tensors
            d_sum, d_weight = gradients(dy, ds, s, weight, inverse, trained=ctx.needs_input_grad[1])
            d_sum = d_sum.view(ctx.shape)
        dtype, residual_dtype = ctx.dtypes
        dx = None if d_sum is None else d_sum.to(dtype)
        d_residual = None if d_sum is None or residual_dtype is None else d_sum.to(residual_dtype)
        return dx, d_weight, d_residual, None, None


def normalise(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, what it is the norm of (x as rows without a residual), and 1 / its root mean square `[N]` fp32."""
    rows = _rows(x)
    others = rows if residual is None else _rows(residual)
    dtype = torch.promote_types(rows.dtype, others.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    s = rows if residual is None else torch.empty_like(y)
    inverse = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    work = _work("forward", rows)
    launch(
        _forward_kernel,
        (work.programs,),
        (rows, others, weight, s, y, inverse),
        (rows.shape[0], work.steps, epsilon),
        D=rows.shape[1],
        X_STRIDE=_stride(rows),
        RESIDUAL_STRIDE=_stride(others),
        BLOCK_N=work.rows,
        BLOCK_D=work.block,
        RESIDUAL=residual is not None,
        num_warps=work.warps,
    )
    return y, s, inverse


def gradients(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, inverse: Tensor, *, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Of what was normalised, `[N, D]` in its dtype, and of the weight where it is trained."""
    rows, dy = _rows(s), _rows(dy)
    others = dy if ds is None else _rows(ds)
    work = _work("trained" if trained else "backward", rows)
    size = rows.shape[1]
    d_sum = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    sums = torch.empty(work.programs, size, dtype=torch.float32, device=rows.device) if trained else None
    launch(
        _backward_kernel,
        (work.programs,),
        (dy, others, rows, weight, inverse, d_sum, inverse if sums is None else sums),
        (rows.shape[0], work.steps),
        D=size,
        DY_STRIDE=_stride(dy),
        DS_STRIDE=_stride(others),
        S_STRIDE=_stride(rows),
        BLOCK_N=work.rows,
        BLOCK_D=work.block,
        RESIDUAL=ds is not None,
        TRAINED=trained,
        num_warps=work.warps,
    )
    return d_sum, None if sums is None else sums.sum(0).to(weight.dtype)


@triton.jit(do_not_specialize=["rows", "steps", "epsilon"])  # type: ignore[untyped-decorator]
def _forward_kernel(
    x_ptr,  # [N, D], rows X_STRIDE apart
    residual_ptr,  # [N, D], rows RESIDUAL_STRIDE apart
    weight_ptr,  # [D]
    s_ptr,  # [N, D]
    y_ptr,  # [N, D]
    inverse_ptr,  # [N], of the root mean square
    rows,
    steps,
    epsilon,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    in_d = columns < D
    weight = tl.load(weight_ptr + columns, mask=in_d, other=0.0).to(tl.float32)
    first = tl.program_id(0) * steps
    for step in range(first, first + steps):
        row = (step * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # offsets pass 2**31 before memory ends
        real = row < rows
        inside = real[:, None] & in_d[None, :]
        at = row[:, None] * D + columns[None, :]
        s = tl.load(x_ptr + row[:, None] * X_STRIDE + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            from_row = residual_ptr + row[:, None] * RESIDUAL_STRIDE + columns[None, :]
            rounded = (s + tl.load(from_row, mask=inside, other=0.0).to(tl.float32)).to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + at, rounded, mask=inside)
            s = rounded.to(tl.float32)  # what the backward pass will read
        inverse = tl.rsqrt(tl.sum(s * s, axis=1) * (1.0 / D) + epsilon)
        y = s * inverse[:, None] * weight[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(inverse_ptr + row, inverse, mask=real)


@triton.jit(do_not_specialize=["rows", "steps"])  # type: ignore[untyped-decorator]
def _backward_kernel(
    dy_ptr,  # [N, D], rows DY_STRIDE apart
    ds_ptr,  # [N, D], rows DS_STRIDE apart
    s_ptr,  # [N, D], rows S_STRIDE apart
    weight_ptr,  # [D]
    inverse_ptr,  # [N]
    d_sum_ptr,  # [N, D]
    sums_ptr,  # [programs, D]
    rows,
    steps,
    D: tl.constexpr,
    DY_STRIDE: tl.constexpr,
    DS_STRIDE: tl.constexpr,
    S_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TRAINED: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    in_d = columns < D
    weight = tl.load(weight_ptr + columns, mask=in_d, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    first = tl.program_id(0) * steps
    for step in range(first, first + steps):
        row = (step * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        real = row < rows
        inside = real[:, None] & in_d[None, :]
        dy = tl.load(dy_ptr + row[:, None] * DY_STRIDE + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row[:, None] * S_STRIDE + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row, mask=real, other=0.0)
        normalised = s * inverse[:, None]
        if TRAINED:
            d_weight += dy * normalised
        dy = dy * weight[None, :]
        d_sum = (dy - normalised * (tl.sum(dy * normalised, axis=1) * (1.0 / D))[:, None]) * inverse[:, None]
        if RESIDUAL:
            from_row = ds_ptr + row[:, None] * DS_STRIDE + columns[None, :]
            d_sum += tl.load(from_row, mask=inside, other=0.0).to(tl.float32)
        at = row[:, None] * D + columns[None, :]
        tl.store(d_sum_ptr + at, d_sum.to(d_sum_ptr.dtype.element_ty), mask=inside)
    if TRAINED:
        tl.store(sums_ptr + tl.program_id(0) * D + columns, tl.sum(d_weight, axis=0), mask=in_d)
