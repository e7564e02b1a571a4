"""The gated MLP as one step of autograd, on the kernels of its parts and the library's matrix products.

Five steps of autograd became one: the host queues fewer things, and what can be made again is not kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..lora_linear.eager import LoraProjection, is_kept, parameter_gradients, product, restored
from ..lora_linear.kernel import adapted
from ..rms_norm.kernel import gradients as norm_gradients
from ..rms_norm.kernel import normalise
from ..swiglu.kernel import activate, differentiate


def gated_mlp(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    gate: LoraProjection,
    up: LoraProjection,
    down: LoraProjection,
    *,
    epsilon: float,
) -> Tensor:
    """See `hybridize_kernels.gated_mlp`."""
    projections = (gate, up, down)
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            scales = tuple(projection.scale for projection in projections)
            tensors = [tensor for projection in projections for tensor in projection[:4]]
            y: Tensor = _GatedMLP.apply(x, residual, norm_weight, float(epsilon), scales, *tensors)
            return y
        normed, s, _ = normalise(x, norm_weight, epsilon, residual)
        gates, ups = (product(normed, p, adapted(p, s.dtype)) for p in (gate, up))
        return product(activate(gates, ups), down, adapted(down, s.dtype), s)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        epsilon: float,
        scales: tuple[float, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        normed, s, inverse = normalise(x, norm_weight, epsilon, residual)
        gate, up, down = (projection for projection, _ in restored(tensors, scales, ()))
        weights = [adapted(projection, s.dtype) for projection in (gate, up, down)]
        gates, ups = product(normed, gate, weights[0]), product(normed, up, weights[1])
        y = product(activate(gates, ups), down, weights[2], s)
        kept = [weight if is_kept(weight, inverse.numel()) else None for weight in weights]
        ctx.save_for_backward(s, inverse, gates, ups, norm_weight, *kept, *tensors)
        ctx.epsilon, ctx.scales = epsilon, scales
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        s, inverse, gates, ups, norm_weight, *others = ctx.saved_tensors
        projections = restored(others[3:], ctx.scales, ctx.needs_input_grad[5:])
        weights = [adapted(p, s.dtype) if w is None else w for w, (p, _) in zip(others[:3], projections, strict=True)]
        learns = [any(wanted) for _, wanted in projections]
        rows, d_rows = s.flatten(0, -2), d_y.flatten(0, -2)

        d_inner = d_rows @ weights[2]
        inner = torch.empty_like(d_inner) if learns[2] else None
        d_gates, d_ups = torch.empty_like(d_inner), torch.empty_like(d_inner)
        differentiate(d_inner, (gates.flatten(0, -2), ups.flatten(0, -2)), (d_gates, d_ups), inner)
        of_down = parameter_gradients(inner, d_rows, *projections[2])
        del inner, d_inner
        normed = normalise(rows, norm_weight, ctx.epsilon)[0] if learns[0] or learns[1] else None
        of_gate = parameter_gradients(normed, d_gates, *projections[0])
        of_up = parameter_gradients(normed, d_ups, *projections[1])
        d_normed = (d_gates @ weights[0]).addmm_(d_ups, weights[1])
        trained = ctx.needs_input_grad[2]
        d_sum, d_weight = norm_gradients(d_normed, d_rows, rows, norm_weight, inverse, trained=trained)
        d_sum = d_sum.view(s.shape)
        return d_sum, d_sum, d_weight, None, None, *of_gate, *of_up, *of_down
