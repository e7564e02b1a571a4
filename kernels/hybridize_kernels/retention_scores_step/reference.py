"""A step's scores told one layer, row and head after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..token_scorer.reference import token_scorer_step


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
    threshold: Tensor | None,
    score: str,
    steps_per_unit: float,
) -> None:
    """See `hybridize_kernels.retention_scores_step`; what the other forms must equal."""
    kernel = weights[0].shape[2] // (2 * k.shape[3])
    margin = len(weights) * dilation * (kernel - 1) // 2
    one = torch.ones(1, dtype=torch.int64)
    for layer in range(len(k)):
        for row, position in enumerate(positions.flatten().tolist()):
            if position < 0:
                continue
            logits = token_scorer_step(
                k[layer, row, None, None],
                v[layer, row, None, None],
                history[layer, row, None],
                one,
                position * one,
                [weight[layer] for weight in weights],
                [bias[layer] for bias in biases],
                output_weight[layer],
                output_bias[layer],
                dilation=dilation,
            )[0, 0]  # [H]
            if position < margin:
                continue
            for head, x in enumerate(logits):
                if threshold is not None:
                    x = x - threshold[layer, head]
                s = x.sigmoid() - 0.5 if score == "sigmoid" else x.clamp(min=0)
                scores[layer, row, head, (position - margin) % window] = (s * steps_per_unit).round() / steps_per_unit
