"""A step's scores in plain PyTorch: in place, and without waiting for the device.

With one row the heads of all layers are taken for those of one layer, where each has a scorer of its own: a few
operations instead of a few a layer.

This file imports nothing but torch and the scorer's eager form.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter

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
    num_new, num_before = real.long(), position.clamp(min=0)

    def logits(k: Tensor, v: Tensor, history: Tensor, of_layers: Callable[[Tensor], Tensor]) -> Tensor:
        """`[B, heads]` of a layer, or of several as one; the history is written in place."""
        return token_scorer_step(
            k[:, None],
            v[:, None],
            history,
            num_new,
            num_before,
            [of_layers(weight) for weight in weights],
            [of_layers(bias) for bias in biases],
            of_layers(output_weight),
            of_layers(output_bias),
            dilation=dilation,
        )[:, 0]

    if k.shape[1] == 1 and weights[0].shape[1] == k.shape[2]:
        keys, values, inputs = (x.reshape(1, -1, x.shape[-1]) for x in (k, v, history))  # of the history a view
        x = logits(keys, values, inputs, lambda parameter: parameter.flatten(0, 1)).view(k.shape[:3])
    else:
        x = torch.stack([logits(k[n], v[n], history[n], itemgetter(n)) for n in range(len(k))])
    if threshold is not None:
        x = x - threshold[:, None]
    value = torch.sigmoid(x) - 0.5 if score == "sigmoid" else torch.relu(x)
    fresh = (torch.round(value * steps_per_unit) / steps_per_unit).to(scores.dtype)[..., None]
    slot = (final % window)[:, None, None].expand(*scores.shape[:3], 1)
    written = (real & (final >= 0))[:, None, None]
    scores.scatter_(3, slot, torch.where(written, fresh, scores.gather(3, slot)))
