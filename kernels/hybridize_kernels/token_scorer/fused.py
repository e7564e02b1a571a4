"""The token scorer in Triton: a kernel a convolution, forward and back, over texts of any length.

Nothing is kept for the backward pass but the keys, the values, the rounded weights and the seed of dropout. Running the
convolutions again makes that pass half as long again, and spares every layer of a model a tensor of 3/4 the size of its
keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import needs_grad
from ..kept import tables_of_bounds
from .convolution import Layer, Projection, Text, convolve, is_exact
from .eager import documents_of_tokens
from .factors import Shape, parts_of, prepare
from .input_gradient import input_gradient
from .tiles import tiles_override
from .weight_gradient import gradients_of, layout_of, splits_of, weight_gradient


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
    compute = torch.float32 if compute_dtype is None else compute_dtype
    start, end = _ranges(k, real, cu_seqlens)
    call = _Call(
        packed=cu_seqlens is not None,
        dilation=dilation,
        dropped=min(round(dropout * 2**24), 2**24 - 1),
        compute=compute,
        learns=needs_grad(k, v, *weights, *biases, output_weight, output_bias),
    )
    seed = torch.randint(2**32, (1,), device=k.device) if call.dropped else None
    logits: Tensor = _TokenScorer.apply(k, v, start, end, seed, call, output_weight, output_bias, *weights, *biases)
    return logits


class _Call(NamedTuple):
    """What autograd does not see."""

    packed: bool
    dilation: int
    dropped: int
    compute: torch.dtype
    learns: bool


def _ranges(k: Tensor, real: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Between which columns the tokens lie that a token sees, int32: `[B]`, `[T]` of packed documents, or all."""
    if cu_seqlens is not None:
        return tables_of_bounds(documents_of_tokens, cu_seqlens, k.device, k.shape[1])
    if real is None:
        return None, None
    # A row's tokens lie side by side, so two numbers say where; both are found without asking the device.
    start = real.to(torch.int32).argmax(dim=1)
    return start.to(torch.int32), (start + real.sum(dim=1)).to(torch.int32)


class _TokenScorer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        seed: Tensor | None,
        call: _Call,
        output_weight: Tensor,
        output_bias: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        k, v, output_weight, output_bias = (_in_order(x) for x in (k, v, output_weight, output_bias))
        weights, biases = _halves([_in_order(x) for x in parameters])
        shapes = _shapes(weights, k.shape[-1])
        prepared = None
        if call.learns or any(x.dtype != call.compute for x in weights):
            prepared = prepare(shapes, weights, call.compute, turned=call.learns)
        ctx.save_for_backward(k, v, start, end, seed, prepared, output_weight, output_bias, *weights, *biases)
        ctx.call = call
        text = _text(k, v, start, end, seed, weights, call)
        layers = _layers(weights if prepared is None else parts_of(shapes, prepared).plain, weights, biases, shapes)
        logits = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
        z = None
        tokens = logits.numel()
        for index, shape in enumerate(shapes[:-1]):
            next_z = torch.empty(tokens * shape.outputs, dtype=call.compute, device=k.device)
            convolve(text, layers, index, z, next_z, None)
            z = next_z
        convolve(text, layers, len(layers) - 1, z, None, Projection(output_weight, output_bias, logits))
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        k, v, start, end, seed, prepared, output_weight, output_bias, *parameters = ctx.saved_tensors
        weights, biases = _halves(parameters)
        shapes = _shapes(weights, k.shape[-1])
        text = _text(k, v, start, end, seed, weights, ctx.call)
        factors = parts_of(shapes, prepared)
        layers = _layers(factors.plain, weights, biases, shapes)
        zs, dzs = _workspaces(k, shapes, ctx.call.compute)
        partial = _run_again(text, layers, zs, dzs[-1], Projection(output_weight, output_bias, _plain(gradient)))

        # Of layer `index`, whose inputs are z of the layer before, or the text.
        inputs = [None, *zs]
        wanted = any(ctx.needs_input_grad[6:])
        layout = layout_of(tuple(x.numel() for x in parameters))
        sums = torch.empty(
            splits_of(text, *biases[0].shape) if wanted else 0,
            layout.width,
            dtype=torch.float32,
            device=k.device,
        )
        for index in range(len(layers) - 1, -1, -1):
            if wanted:
                weight_gradient(text, layers, index, dzs[index], inputs[index], sums, layout)
            if index > 0:
                turned = factors.turned[index]
                input_gradient(text, layers, index, turned, dzs[index], zs[index - 1], dzs[index - 1])
        dk, dv = _of_text(text, layers, factors.turned[0], dzs[0], ctx.needs_input_grad[:2])
        d_output = _of_projection(partial, k.shape[2], output_weight)
        return (
            dk,
            dv,
            *(None,) * 4,
            *(_as(x, like) for x, like in zip(d_output, (output_weight, output_bias), strict=True)),
            *(gradients_of(sums, layout, parameters) if wanted else (None,) * len(parameters)),
        )


def _run_again(text: Text, layers: list[Layer], zs: Sequence[Tensor], d_last: Tensor, projection: Projection) -> Tensor:
    """The convolutions once more, into `zs`, and the gradient of the last one's z into `d_last`.

    projection: with the logits' gradient. Returns `Projection.partial`.
    """
    last = len(layers) - 1
    inputs = [None, *zs]
    for index in range(last):
        convolve(text, layers, index, inputs[index], zs[index], None)
    batch, time, heads, _ = text.k.shape
    outputs = layers[last].bias.shape[1]
    tiles = triton.cdiv(time, text.tiles(outputs, exact=is_exact(text, last)).convolution.tokens)
    partial = torch.empty(batch, tiles, heads * (outputs + 1), dtype=torch.float32, device=d_last.device)
    convolve(text, layers, last, inputs[last], d_last, projection._replace(partial=partial))
    return partial


def _of_text(
    text: Text, layers: list[Layer], turned: Tensor, gradient: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of keys and values that are wanted, side by side in memory."""
    if not any(wanted):
        return None, None
    of_parts = torch.empty((sum(wanted), *text.k.shape), dtype=text.k.dtype, device=text.k.device)
    first = 0 if wanted[0] else 1
    input_gradient(text, layers, 0, turned, gradient, None, of_parts, parts=sum(wanted), first=first)
    parts = of_parts.unbind(0)
    return parts[0] if wanted[0] else None, parts[-1] if wanted[1] else None


def _text(
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    seed: Tensor | None,
    weights: Sequence[Tensor],
    call: _Call,
) -> Text:
    kernel = weights[0].shape[1] // (2 * k.shape[-1])
    override = tiles_override()
    return Text(k, v, start, end, call.packed, kernel, call.dilation, call.dropped, seed, call.compute, override)


def _shapes(weights: Sequence[Tensor], head_size: int) -> tuple[Shape, ...]:
    kernel = weights[0].shape[1] // (2 * head_size)
    return tuple(Shape(w.shape[0] * kernel, w.shape[1] // kernel, w.shape[2]) for w in weights)


def _layers(
    factors: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], shapes: tuple[Shape, ...]
) -> list[Layer]:
    return [
        Layer(factor, bias, shape.inputs, weight.dtype)
        for factor, weight, bias, shape in zip(factors, weights, biases, shapes, strict=True)
    ]


def _workspaces(
    k: Tensor, shapes: tuple[Shape, ...], compute: torch.dtype
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Memory for z of every layer but the last, and for the gradient of every z; one allocation."""
    outputs = [shape.outputs for shape in shapes]
    tokens = k.shape[0] * k.shape[1] * k.shape[2]
    sizes = [tokens * n for n in (*outputs[:-1], *outputs)]
    parts = torch.empty(sum(sizes), dtype=compute, device=k.device).split(sizes)
    return parts[: len(outputs) - 1], parts[len(outputs) - 1 :]


def _in_order(x: Tensor) -> Tensor:
    """x with the numbers of its last dimension side by side, and of a parameter all of them."""
    whole = x.stride(-1) == 1 if x.ndim == 4 else x.is_contiguous()
    return x if whole else x.contiguous()


def _halves(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Weights and biases."""
    count = len(parameters) // 2
    return parameters[:count], parameters[count:]


def _plain(gradient: Tensor) -> Tensor:
    """Of the logits, in fp32 and contiguous."""
    return gradient.to(torch.float32).contiguous()


def _of_projection(partial: Tensor, heads: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`Projection.partial` -> the numbers of the gradients of the projection's weight `[H or 1, C, 1]` and its bias:
    the sum over rows and tiles, and over heads that share a scorer."""
    channels = weight.shape[1]
    of_weight, of_bias = partial.sum((0, 1)).split([heads * channels, heads])
    if weight.shape[0] == heads:
        return of_weight, of_bias
    return of_weight.view(heads, channels).sum(0), of_bias.sum(0)


def _as(x: Tensor, like: Tensor) -> Tensor:
    """In the shape and type of a parameter."""
    x = x.view(like.shape)
    return x if x.dtype == like.dtype else x.to(like.dtype)
