"""A step's scores in plain PyTorch, layer by layer: in place, and without waiting for the device.

This file imports nothing but torch and the scorer's eager form.
"""

from collections.abc import Sequence

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
    slot = (final % window)[:, None, None].expand(-1, k.shape[2], -1)  # [B, H, 1]
    written = (real & (final >= 0))[:, None, None]
    for layer in range(len(k)):
        x = token_scorer_step(
            k[layer, :, None],
            v[layer, :, None],
            history[layer],
            real.long(),
            position.clamp(min=0),
            [weight[layer] for weight in weights],
            [bias[layer] for bias in biases],
            output_weight[layer],
            output_bias[layer],
            dilation=dilation,
        )[:, 0]  # [B, H]
        if threshold is not None:
            x = x - threshold[layer]
        value = torch.sigmoid(x) - 0.5 if score == "sigmoid" else torch.relu(x)
        fresh = torch.round(value * steps_per_unit) / steps_per_unit
        of_layer = scores[layer]
        of_layer.scatter_(2, slot, torch.where(written, fresh[..., None].to(scores.dtype), of_layer.gather(2, slot)))
