"""The token scorer in Triton: a kernel a convolution, forward and back, over texts of any length.

Nothing is kept for the backward pass but the keys, the values and the seed of dropout. Running the convolutions again
makes that pass half as long again, and spares every layer of a model a tensor of 3/4 the size of its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kept import tables_of_bounds
from .convolution import Layer, Projection, Text, convolve
from .eager import documents_of_tokens
from .gradients import input_gradient, weight_gradient
from .tiles import tiles_for


def token_scorer(
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    real: Tensor | None,
    *,
    dilation: int,
    dropout: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """See `hybridize_kernels.token_scorer`."""
    start, end = _ranges(k, real, cu_seqlens)
    seed = torch.randint(2**32, (1,), device=k.device) if dropout else start
    logits: Tensor = _TokenScorer.apply(
        k,
        v,
        start,
        end,
        seed,
        dilation,
        min(round(dropout * 2**24), 2**24 - 1),
        torch.float32 if compute_dtype is None else compute_dtype,
        output_weight,
        output_bias,
        *weights,
        *biases,
    )
    return logits


def _ranges(k: Tensor, real: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Between which columns the tokens lie that a token sees, int32: `[B]`, or `[T]` of packed documents."""
    batch, time = k.shape[:2]
    if cu_seqlens is not None:
        return tables_of_bounds(documents_of_tokens, cu_seqlens, k.device, time)
    if real is None:
        start = torch.zeros(batch, dtype=torch.int32, device=k.device)
        return start, torch.full_like(start, time)
    # A row's tokens lie side by side, so two numbers say where; both are found without asking the device.
    start = real.to(torch.int32).argmax(dim=1)
    return start.to(torch.int32), (start + real.sum(dim=1)).to(torch.int32)


class _TokenScorer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        end: Tensor,
        seed: Tensor,
        dilation: int,
        dropped: int,
        compute: torch.dtype,
        output_weight: Tensor,
        output_bias: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(k, v, start, end, seed, output_weight, output_bias, *parameters)
        ctx.options = dilation, dropped, compute
        text, layers = _prepared(k, v, start, end, seed, parameters, *ctx.options)
        logits = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
        z = None
        for index in range(len(layers) - 1):
            z = _next(text, layers, index, z)
        convolve(text, layers, len(layers) - 1, z, None, Projection.of(output_weight, output_bias, logits))
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        k, v, start, end, seed, output_weight, output_bias, *parameters = ctx.saved_tensors
        text, layers = _prepared(k, v, start, end, seed, parameters, *ctx.options)
        batch, time, heads = gradient.shape
        scorers = output_weight.shape[0]
        gradient = gradient.float().contiguous()

        zs: list[Tensor | None] = [None]
        for index in range(len(layers) - 1):
            zs.append(_next(text, layers, index, zs[-1]))
        last = len(layers) - 1
        outputs = layers[last].bias.shape[-1]
        tiles = triton.cdiv(time, tiles_for(outputs, text.compute).convolution.tokens)
        partial = torch.empty(batch, heads, tiles, outputs, dtype=torch.float32, device=k.device)
        dz = torch.empty(batch, heads, time, outputs, dtype=text.compute, device=k.device)
        convolve(text, layers, last, zs[last], dz, Projection.of(output_weight, output_bias, gradient, partial))

        weight_gradients: list[Tensor | None] = [None] * len(layers)
        bias_gradients: list[Tensor | None] = [None] * len(layers)
        dk = dv = None
        for index in range(last, -1, -1):
            weight, z = layers[index].weight, zs.pop()
            if any(ctx.needs_input_grad[8:]):
                sums = weight_gradient(text, index, dz, z, scorers)
                weight_gradients[index], bias_gradients[index] = (
                    x.to(like.dtype) for x, like in zip(sums, parameters[index :: len(layers)], strict=True)
                )
            # The channels that are summed over lie along the rows of a product's right factor.
            turned = weight.unflatten(1, (text.kernel, -1)).transpose(2, 3).contiguous()
            if z is not None:
                before = torch.empty_like(z)
                input_gradient(text, turned, index, dz, z, before)
                dz = before
                continue
            if ctx.needs_input_grad[0]:
                dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
                input_gradient(text, turned, index, dz, None, dk)
            if ctx.needs_input_grad[1]:
                dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
                input_gradient(text, turned, index, dz, None, dv, first=k.shape[-1])

        d_output_weight = _of_scorers(partial.sum(2), scorers)[..., None].to(output_weight.dtype)
        d_output_bias = _of_scorers(gradient.sum(1)[..., None], scorers).to(output_bias.dtype)
        no = (None,) * 6
        return dk, dv, *no, d_output_weight, d_output_bias, *weight_gradients, *bias_gradients


def _prepared(
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    seed: Tensor,
    parameters: Sequence[Tensor],
    dilation: int,
    dropped: int,
    compute: torch.dtype,
) -> tuple[Text, list[Layer]]:
    count = len(parameters) // 2
    layers = [
        Layer.of(weight, bias, compute) for weight, bias in zip(parameters[:count], parameters[count:], strict=True)
    ]
    kernel = layers[0].weight.shape[1] // (2 * k.shape[-1])
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    return Text(k, v, start, end, kernel, dilation, dropped, seed, compute), layers


def _next(text: Text, layers: list[Layer], index: int, z: Tensor | None) -> Tensor:
    """z of layer `index`, `[B, H, T, C]`."""
    batch, time, heads, _ = text.k.shape
    output = torch.empty(batch, heads, time, layers[index].bias.shape[-1], dtype=text.compute, device=text.k.device)
    convolve(text, layers, index, z, output, None)
    return output


def _of_scorers(x: Tensor, scorers: int) -> Tensor:
    """[B, H, C] -> [H or 1, C]: the sum over rows, and over heads that share a scorer."""
    return x.sum((0, 1))[None] if scorers == 1 else x.sum(0)
