"""Launches of a norm and the linear layer that reads it: one kernel for few rows, those of the parts for many."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..launch import early_option, launch, launches_early
from ..lora_linear.eager import LoraProjection, product
from ..rms_norm.kernel import normalise
from ..swiglu.kernel import activate
from .few_rows import few_rows_kernel
from .tiles import MAX_ROWS, Tile, tile_of, tiles_override


def norm_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    overwrites_residual: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """See `hybridize_kernels.norm_linear`. tile: instead of the table's, of the kernel for few rows."""
    rows = x.numel() // x.shape[-1]
    streamed = x.dtype == weight.dtype and weight.stride(1) == 1
    if rows > MAX_ROWS or not streamed:
        return _in_parts(x, weight, bias, norm_weight, epsilon, residual, activation, overwrites_residual)
    return _at_once(x, weight, bias, norm_weight, epsilon, residual, activation, tile)


def _in_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float | None,
    residual: Tensor | None,
    activation: str | None,
    overwrites_residual: bool,
) -> Tensor:
    """The library's product between the kernels of the norm and of the activation."""
    if norm_weight is not None and epsilon is not None:
        x = normalise(x, norm_weight.contiguous(), epsilon)[0]
    if overwrites_residual and residual is not None and residual.is_contiguous() and residual.dtype == x.dtype:
        # In place: the library would copy the residual first.
        y = residual.view(-1, residual.shape[-1]).addmm_(x.flatten(0, -2), weight.to(x.dtype).T).view(residual.shape)
        return y if bias is None else y.add_(bias)
    y = product(x, LoraProjection(weight, bias), weight.to(x.dtype), residual)
    return activate(y, None) if activation == "swiglu" else y


def _at_once(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float | None,
    residual: Tensor | None,
    activation: str | None,
    tile: Tile | None,
) -> Tensor:
    """One launch, whose programs share out the rows of the weight."""
    inputs = _rows(x)
    rows, size = inputs.shape
    halves = 2 if activation == "swiglu" else 1
    outputs = weight.shape[0] // halves
    added = inputs if residual is None else _rows(residual)
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    if tile is None:
        tile = tile_of(rows, outputs, size, halves, x.element_size(), tiles_override())
    early = launches_early(x)
    launch(
        few_rows_kernel,
        (triton.cdiv(outputs, tile.outputs),),
        (
            inputs,
            weight,
            inputs if bias is None else bias.contiguous(),
            inputs if norm_weight is None else norm_weight.contiguous(),
            added,
            y,
        ),
        (rows, 0.0 if epsilon is None else epsilon),
        N=outputs,
        D=size,
        X_STRIDE=_stride(inputs),
        WEIGHT_STRIDE=_stride(weight),
        RESIDUAL_STRIDE=_stride(added),
        BLOCK_R=1 if rows == 1 else 8 if rows <= 8 else MAX_ROWS,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.width,
        SPLITS=tile.warps,
        STAGES=tile.stages,
        BIAS=bias is not None,
        NORM=norm_weight is not None,
        RESIDUAL=residual is not None,
        SWIGLU=halves == 2,
        EARLY=early,
        num_warps=tile.warps,
        **early_option(early),
    )
    return y


def _rows(x: Tensor) -> Tensor:
    """`[..., D]` -> `[R, D]` with the numbers of a row side by side: a view wherever it can be one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _stride(rows: Tensor) -> int:
    """From row to row; a single row may have any."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]
