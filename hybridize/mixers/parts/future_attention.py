"""What a token will be worth: the attention that later queries pay to it once it has left the window.

A scorer regressed on this learns what to keep without a backward pass through the model. The target is the largest
probability that any query of the group gives to the key, on a logarithmic scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize_kernels import column_statistics

HEADROOM = 2.0
"""Standard deviations by which a token of average worth lies above the threshold of being kept."""


def future_attention(q: Tensor, k: Tensor, *, window: int, positions: Tensor | None, scale: float) -> Tensor:
    """Logarithm of the largest full-attention probability that a query at distance >= window gives each key.

    Args:
        q: [B, T, HQ, D], k: [B, T, H, D], RoPE applied. positions: [B, T], -1 for padding; None: there is none.
        window: tokens; scale: factor on q·k.

    Returns:
        [B, T, H] float32, without gradient; -inf where no query is that far.
    """
    largest, _ = column_statistics(q, k, window=window, positions=positions, scale=scale, need_sum=False)
    return largest


def retention_target_loss(logit: Tensor, future: Tensor, positions: Tensor, *, sinks: int) -> Tensor:
    """Mean squared error between the scorer's logits and the future attention, standardised per row and head.

    The target is HEADROOM + (future - mean) / deviation, so that nearly every token is kept while there is room and
    the ranking decides when the cap binds. (A threshold at the budget's quantile leaves slots empty: a regression
    shrinks towards the mean, which lies far below that quantile.) Sinks stay anyway and do not count.

    Args:
        logit, future: [B, T, H]. positions: [B, T].

    Returns:
        A scalar; 0 if the sequences are too short for any target.
    """
    with torch.no_grad():
        known = future.isfinite() & (positions >= sinks)[..., None]
        count = known.sum(1, keepdim=True).clamp(min=1)  # [B, 1, H]
        value = future.masked_fill(~known, 0.0)
        mean = value.sum(1, keepdim=True) / count
        centred = (value - mean).masked_fill(~known, 0.0)
        deviation = (centred.square().sum(1, keepdim=True) / count).sqrt().clamp(min=1e-3)
        target = HEADROOM + centred / deviation
    error = (logit - target).masked_fill(~known, 0.0)
    return error.square().sum() / known.sum().clamp(min=1)
