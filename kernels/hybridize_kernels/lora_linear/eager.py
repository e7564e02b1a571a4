"""Linear layers with low-rank adapters on torch's matrix products.

This file imports nothing but torch: exported models carry it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SKINNY_ABOVE = 400
"""On a GPU, the gradient of the whole weight costs in · out operations a token, a narrow product with the adapter
(in + out) numbers to be read: below so many operations a number, the former is faster (matrix rate over bandwidth)."""


class LoraProjection(NamedTuple):
    """A linear layer and its adapter.

    Attributes:
        weight: `[out, in]`. bias: `[out]` or None.
        down: `[rank, in]` and up: `[out, rank]`, or None. scale: on their product.
    """

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


def lora_linear(
    x: Tensor, projections: Sequence[LoraProjection], *, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """y_i = x (W_i + s_i · up_i down_i)ᵀ + b_i. x `[..., in]`, residual `[..., out]` -> `[..., out_i]` each."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    scales = tuple(projection.scale for projection in projections)
    tensors = [tensor for projection in projections for tensor in projection[:4]]
    outputs: tuple[Tensor, ...] = _LoraLinear.apply(x, residual, scales, *tensors)
    return outputs


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, scales: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            for weight, bias, down, up, scale in _parts(tensors, scales):
                adapted = _adapted(weight, down, up, scale, x.dtype)
                if residual is not None:
                    y = torch.addmm(residual.flatten(0, -2), rows, adapted.T)
                    y = y if bias is None else y.add_(bias)
                elif bias is not None:
                    y = torch.addmm(bias.to(x.dtype), rows, adapted.T)
                else:
                    y = rows @ adapted.T
                outputs.append(y.view(*x.shape[:-1], weight.shape[0]))
        learns = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(rows if learns else None, *tensors)
        ctx.scales, ctx.shape, ctx.dtype = scales, x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, *tensors = ctx.saved_tensors
        d_x: Tensor | None = None
        d_tensors: list[Tensor | None] = []
        for number, (weight, bias, down, up, scale) in enumerate(_parts(tensors, ctx.scales)):
            d_y = gradients[number].flatten(0, -2)
            if ctx.needs_input_grad[0]:
                adapted = _adapted(weight, down, up, scale, ctx.dtype)
                d_x = d_y @ adapted if d_x is None else d_x.addmm_(d_y, adapted)
            wanted = ctx.needs_input_grad[3 + 4 * number : 7 + 4 * number]
            d_tensors += _parameter_gradients(rows, d_y, (weight, bias, down, up), scale, wanted)
        d_residual = gradients[0] if ctx.needs_input_grad[1] else None
        return (None if d_x is None else d_x.view(ctx.shape), d_residual, None, *d_tensors)


def _parts(tensors: Sequence[Any], scales: tuple[float, ...]) -> list[tuple[Any, Any, Any, Any, float]]:
    return [(*tensors[4 * number : 4 * number + 4], scale) for number, scale in enumerate(scales)]


def _adapted(weight: Tensor, down: Tensor | None, up: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """W + s · up down, summed in the products' precision and rounded once."""
    if down is None or up is None:
        return weight.to(dtype)
    return torch.addmm(weight.to(dtype), up.to(dtype), down.to(dtype), alpha=scale)


def _parameter_gradients(
    x: Tensor, d_y: Tensor, parts: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None], scale: float, wanted: Any
) -> list[Tensor | None]:
    """Of weight, bias, down and up, where wanted; x `[N, in]`, d_y `[N, out]`."""
    weight, bias, down, up = parts
    d_weight = _product(d_y.T, x, weight.dtype) if wanted[0] else None
    wide = torch.promote_types(d_y.dtype, torch.float32)
    d_bias = d_y.sum(0, dtype=wide).to(bias.dtype) if wanted[1] and bias is not None else None
    d_down = d_up = None
    if down is not None and up is not None and (wanted[2] or wanted[3]):
        size = weight.shape[0] * weight.shape[1] / sum(weight.shape)
        if x.is_cuda and size < SKINNY_ABOVE:
            whole = _product(d_y.T, x, down.dtype) if d_weight is None else d_weight.to(down.dtype)
            d_down, d_up = scale * (up.T @ whole), scale * (whole @ down.T)
        else:
            d_down = scale * _product((d_y @ up.to(d_y.dtype)).T, x, down.dtype)
            d_up = scale * _product(d_y.T, x @ down.to(x.dtype).T, up.dtype)
    return [d_weight, d_bias, d_down, d_up]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; where the GPU's library can, with no rounding between its sums and that."""
    if a.is_cuda and a.dtype != dtype == torch.float32 and torch.version.cuda is not None:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
