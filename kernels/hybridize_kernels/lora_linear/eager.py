"""Linear layers with low-rank adapters on torch's matrix products.

This file imports nothing but torch: exported models carry it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SKINNY_ABOVE = 400
"""On a GPU, the gradient of the whole weight costs in · out operations a token, narrow products with the adapter
(in + out) numbers to be read: below so many operations a number the former is faster (matrix rate over bandwidth)."""
KEPT_BELOW = 1 / 16
"""An adapted weight is kept for the backward pass where it is smaller than this share of what the product reads and
writes for its tokens; a larger one is made again."""


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

    @property
    def learns(self) -> bool:
        """Whether any part of it gets a gradient."""
        return any(part is not None and part.requires_grad for part in self[:4])


Adapt = Callable[[LoraProjection, torch.dtype], Tensor]
"""The adapted weight `[out, in]` of a projection in a dtype. On a CPU it costs more than products with the adapter."""


def adapted(projection: LoraProjection, dtype: torch.dtype) -> Tensor:
    """W + s · up down, summed in the products' precision and rounded once."""
    weight, _, down, up, scale = projection
    if down is None or up is None:
        return weight.to(dtype)
    return torch.addmm(weight.to(dtype), up.to(dtype), down.to(dtype), alpha=scale)


def lora_linear(
    x: Tensor, projections: Sequence[LoraProjection], *, residual: Tensor | None = None, adapt: Adapt | None = None
) -> tuple[Tensor, ...]:
    """y_i = x (W_i + s_i · up_i down_i)ᵀ + b_i. x `[..., in]`, residual `[..., out]` -> `[..., out_i]` each."""
    adapt = adapted if adapt is None and x.device.type != "cpu" else adapt
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not torch.is_grad_enabled():
        with torch.autocast(x.device.type, enabled=False):
            return tuple(_output(x, p, None if adapt is None else adapt(p, x.dtype), residual) for p in projections)
    scales = tuple(projection.scale for projection in projections)
    tensors = [tensor for projection in projections for tensor in projection[:4]]
    outputs: tuple[Tensor, ...] = _LoraLinear.apply(x, residual, scales, adapt, *tensors)
    return outputs


def product(x: Tensor, projection: LoraProjection, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x `[..., in]` times the adapted weight `[out, in]`, and what is added to it."""
    bias = projection.bias
    if residual is not None:
        y = torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), weight.T).view(residual.shape)
        return y if bias is None else y.add_(bias)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _output(x: Tensor, projection: LoraProjection, weight: Tensor | None, residual: Tensor | None) -> Tensor:
    """The product with the adapted weight or, without one, those with the weight and with its adapter."""
    if weight is not None:
        return product(x, projection, weight, residual)
    y = product(x, projection, projection.weight.to(x.dtype), residual)
    _, _, down, up, scale = projection
    if down is not None and up is not None:
        y.flatten(0, -2).addmm_(x.flatten(0, -2) @ down.to(x.dtype).T, up.to(x.dtype).T, alpha=scale)
    return y


def is_kept(weight: Tensor, tokens: int) -> bool:
    """Whether the adapted form of this weight is kept for the backward pass of so many tokens."""
    return weight.numel() <= KEPT_BELOW * tokens * sum(weight.shape)


def restored(
    tensors: Sequence[Tensor | None], scales: Sequence[float], needs: Sequence[bool]
) -> list[tuple[LoraProjection, Any]]:
    """Projections from flat parts, each with which of its four parts need a gradient."""
    found = []
    for number, scale in enumerate(scales):
        own = slice(4 * number, 4 * number + 4)
        weight, bias, down, up = tensors[own]
        assert weight is not None
        found.append((LoraProjection(weight, bias, down, up, scale), needs[own]))
    return found


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scales: tuple[float, ...],
        adapt: Adapt | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, kept = [], []
        tokens = x.numel() // max(x.shape[-1], 1)
        with torch.autocast(x.device.type, enabled=False):
            for projection, _ in restored(tensors, scales, ()):
                weight = None if adapt is None else adapt(projection, x.dtype)
                outputs.append(_output(x, projection, weight, residual))
                keep = weight is not None and ctx.needs_input_grad[0] and is_kept(weight, tokens)
                kept.append(weight if keep else None)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, *kept, *tensors)
        ctx.scales, ctx.adapt, ctx.shape, ctx.dtype = scales, adapt, x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        count = len(ctx.scales)
        rows = None if x is None else x.flatten(0, -2)
        d_x: Tensor | None = None
        d_tensors: list[Tensor | None] = []
        projections = restored(others[count:], ctx.scales, ctx.needs_input_grad[4:])
        for kept, d_output, (projection, wanted) in zip(others[:count], gradients, projections, strict=True):
            d_y = d_output.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                d_x = _add_input_gradient(d_x, d_y, projection, kept, ctx)
            d_tensors += parameter_gradients(rows, d_y, projection, wanted)
        d_residual = gradients[0] if ctx.needs_input_grad[1] else None
        return (None if d_x is None else d_x.view(ctx.shape), d_residual, None, None, *d_tensors)


def _add_input_gradient(
    d_x: Tensor | None, d_y: Tensor, projection: LoraProjection, kept: Tensor | None, ctx: Any
) -> Tensor:
    """What a projection adds to the gradient of x, in place where there is one."""
    weight, _, down, up, scale = projection
    weight = weight.to(ctx.dtype) if ctx.adapt is None else ctx.adapt(projection, ctx.dtype) if kept is None else kept
    d_x = d_y @ weight if d_x is None else d_x.addmm_(d_y, weight)
    if ctx.adapt is None and down is not None and up is not None:
        d_x.addmm_(d_y @ up.to(ctx.dtype), down.to(ctx.dtype), alpha=scale)
    return d_x


def parameter_gradients(
    x: Tensor | None, d_y: Tensor, projection: LoraProjection, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Of weight, bias, down and up, where wanted; x `[N, in]`, d_y `[N, out]`."""
    weight, bias, down, up, scale = projection
    if x is None or not any(wanted):
        return [None] * 4
    d_weight = _sums(d_y.T, x, weight.dtype) if wanted[0] else None
    wide = torch.promote_types(d_y.dtype, torch.float32)
    d_bias = d_y.sum(0, dtype=wide).to(bias.dtype) if wanted[1] and bias is not None else None
    if down is None or up is None or not (wanted[2] or wanted[3]):
        return [d_weight, d_bias, None, None]
    size = weight.shape[0] * weight.shape[1] / sum(weight.shape)
    if x.is_cuda and size < SKINNY_ABOVE:
        whole = _sums(d_y.T, x, down.dtype) if d_weight is None else d_weight.to(down.dtype)
        d_down = torch.addmm(down, up.T, whole, beta=0, alpha=scale)
        d_up = torch.addmm(up, whole, down.T, beta=0, alpha=scale)
    else:
        d_down = _sums((d_y @ up.to(d_y.dtype)).T, x, down.dtype).mul_(scale)
        d_up = _sums(d_y.T, x @ down.to(x.dtype).T, up.dtype).mul_(scale)
    return [d_weight, d_bias, d_down, d_up]


def _sums(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; where the GPU's library can, with no rounding between its sums and that."""
    if a.is_cuda and a.dtype != dtype == torch.float32 and torch.version.cuda is not None:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
