"""Streaming the scorer in Triton: the convolution kernels for many columns, one kernel for all layers of one column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import Layer, Projection, Text, convolve
from .step import MAX_LAYERS, score_one_column
from .tiles import tiles_override


def token_scorer_step(
    k: Tensor,
    v: Tensor,
    history: Tensor,
    num_new: Tensor,
    num_before: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    *,
    dilation: int,
) -> Tensor:
    """See `hybridize_kernels.token_scorer_step`; for a kernel above 1."""
    batch, time, heads, head_size = k.shape
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    if time == 1 and len(weights) <= MAX_LAYERS:
        return score_one_column(
            k, v, history, num_new, num_before, weights, biases, output_weight, output_bias, dilation=dilation
        )
    logits = torch.empty(batch, time, heads, dtype=torch.float32, device=k.device)
    text = Text(
        k,
        v,
        start=None,
        end=None,
        packed=False,
        kernel=weights[0].shape[1] // (2 * head_size),
        dilation=dilation,
        dropped=0,
        seed=None,
        compute=torch.float32,
        override=tiles_override(),
        history=history,
        num_before=num_before,
    )
    layers = [
        Layer(weight.to(text.compute).contiguous(), bias.contiguous(), weight.shape[1] // text.kernel, weight.dtype)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    projection = Projection(output_weight.contiguous(), output_bias.contiguous(), logits)
    ring = _Ring(history, num_new, num_before, 2 * text.reach)
    inputs: Tensor | None = None
    for index, layer in enumerate(layers):
        z = None
        if index + 1 < len(layers):
            z = torch.empty(batch, heads, time, layer.bias.shape[-1], dtype=text.compute, device=k.device)
            convolve(text, layers, index, inputs, z, None)
        else:
            convolve(text, layers, index, inputs, None, projection)
        # After the kernel that reads what the slots held.
        if inputs is None:
            ring.store(k.transpose(1, 2), v.transpose(1, 2))
        else:
            ring.store(inputs, activate=True)
        inputs = z
    return logits


class _Ring:
    """Writes the last inputs of one layer after the other into their slots of the history."""

    def __init__(self, history: Tensor, num_new: Tensor, num_before: Tensor, stored: int) -> None:
        self.history, self.stored, self.start = history, stored, 0
        slots = torch.arange(stored, device=history.device)
        # The column whose input ends up in a slot; negative where what the slot holds stays.
        column = num_new[:, None] - stored + (slots - num_before[:, None] - num_new[:, None]) % stored
        self.column = column.long()[:, None, :, None]  # [B, 1, stored, 1]

    def store(self, *inputs: Tensor, activate: bool = False) -> None:
        """inputs: `[B, H, T, C]`, parts of the layer's channels."""
        width = sum(x.shape[-1] for x in inputs)
        end = self.start + self.stored * width
        slots = self.history[:, :, self.start : end].unflatten(2, (self.stored, width))
        for x, part in zip(inputs, slots.split([x.shape[-1] for x in inputs], dim=-1), strict=True):
            latest = x.gather(2, self.column.clamp(min=0).expand(*part.shape)).float()
            part.copy_(torch.where(self.column >= 0, F.silu(latest) if activate else latest, part))
        self.start = end
