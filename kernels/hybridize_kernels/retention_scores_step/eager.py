"""A step's scores in plain PyTorch: in place, and without waiting for the device.

With one row the heads of all layers are taken for those of one layer, where each has a scorer of its own: a few
operations instead of a few a layer.

This file imports nothing but torch and the scorer's eager form.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..token_scorer.eager import token_scorer_step


@torch.no_grad()
def retention_scores_step(
    k: Tensor,
    v: Tensor,
    history: Tensor,
    scores: Tensor,
    positions: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    *,
    dilation: int,
    window: int,
    threshold: Tensor | None = None,
    score: str = "sigmoid",
    steps_per_unit: float = 2.0**16,
) -> None:
    """Writes the scores of positions p − m, which the tokens at p complete, into slots (p − m) mod W.

    k, v: `[L, B, H, D]` of L layers; history: `[L, B, H, width]` and scores: `[L, B, H, W + C]`, in place; positions:
    `[B]` or `[B, 1]`, p of each row, −1 for one that takes no part; weights `[L, S, kernel · C, C']`, biases
    `[L, S, C']`, output_weight `[L, S, C, 1]`, output_bias `[L, S, 1]`, S = 1 or H; threshold: `[L, H]` or None.
    """
    kernel = weights[0].shape[2] // (2 * k.shape[3])
    margin = len(weights) * dilation * (kernel - 1) // 2
    position = positions.long().view(-1)
    real = position >= 0
    final = position - margin
    arguments = k, v, history, weights, biases, output_weight, output_bias
    options: dict[str, Any] = {"num_new": real.long(), "num_before": position.clamp(min=0), "dilation": dilation}
    together = k.shape[1] == 1 and weights[0].shape[1] == k.shape[2]
    x = _of_all_layers(*arguments, options) if together else _layer_by_layer(*arguments, options)
    if threshold is not None:
        x = x - threshold[:, None]
    value = torch.sigmoid(x) - 0.5 if score == "sigmoid" else torch.relu(x)
    fresh = (torch.round(value * steps_per_unit) / steps_per_unit).to(scores.dtype)[..., None]
    slot = (final % window)[:, None, None].expand(*scores.shape[:3], 1)
    written = (real & (final >= 0))[:, None, None]
    scores.scatter_(3, slot, torch.where(written, fresh, scores.gather(3, slot)))


def _layer_by_layer(
    k: Tensor,
    v: Tensor,
    history: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """The logits `[L, B, H]`; the history is written in place."""
    logits = [
        token_scorer_step(
            k[layer, :, None],
            v[layer, :, None],
            history[layer],
            weights=[weight[layer] for weight in weights],
            biases=[bias[layer] for bias in biases],
            output_weight=output_weight[layer],
            output_bias=output_bias[layer],
            **options,
        )[:, 0]
        for layer in range(len(k))
    ]
    return torch.stack(logits)


def _of_all_layers(
    k: Tensor,
    v: Tensor,
    history: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """The same for one row and scorers that no heads share; the history `[L, 1, H, width]` is that of L · H heads."""
    logits = token_scorer_step(
        k.reshape(1, 1, -1, k.shape[-1]),
        v.reshape(1, 1, -1, v.shape[-1]),
        history.view(1, -1, history.shape[-1]),
        weights=[weight.flatten(0, 1) for weight in weights],
        biases=[bias.flatten(0, 1) for bias in biases],
        output_weight=output_weight.flatten(0, 1),
        output_bias=output_bias.flatten(0, 1),
        **options,
    )
    return logits.view(k.shape[:3])
