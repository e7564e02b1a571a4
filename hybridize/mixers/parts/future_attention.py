"""What a token will be worth: the attention that later queries pay to it once it has left the window.

A scorer regressed on this learns what to keep without a backward pass through the model. The target is the largest
probability that any query of the group gives to the key, on a logarithmic scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize.mixers.parts.documents import document_counts, document_of_tokens, document_sums
from hybridize_kernels import column_statistics

HEADROOM = 2.0
"""Standard deviations by which a token of average worth lies above the threshold of being kept."""


def future_attention(
    q: Tensor,
    k: Tensor,
    *,
    window: int,
    positions: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Logarithm of the largest full-attention probability that a query at distance >= window gives each key.

    Args:
        q: [B, T, HQ, D], k: [B, T, H, D], RoPE applied. positions: [B, T], -1 for padding; None: there is none.
        window: tokens; scale: factor on q·k.
        cu_seqlens: [N + 1], the bounds of documents of one row, instead of positions; None: one text a row.

    Returns:
        [B, T, H] float32, without gradient; -inf where no query is that far.
    """
    largest, _ = column_statistics(
        q, k, window=window, positions=positions, cu_seqlens=cu_seqlens, scale=scale, need_sum=False
    )
    return largest


def retention_target_loss(
    logit: Tensor, future: Tensor, positions: Tensor, *, sinks: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean squared error between the scorer's logits and the future attention, standardised per text and head.

    The target is HEADROOM + (future - mean) / deviation, so that nearly every token is kept while there is room and
    the ranking decides when the cap binds. (A threshold at the budget's quantile leaves slots empty: a regression
    shrinks towards the mean, which lies far below that quantile.) Sinks stay anyway and do not count.

    Args:
        logit, future: [B, T, H]. positions: [B, T].
        cu_seqlens: [N + 1], the bounds of documents of one row, each a text; None: a row is one.

    Returns:
        A scalar; 0 if the sequences are too short for any target.
    """
    with torch.no_grad():
        known = future.isfinite() & (positions >= sinks)[..., None]
        value = future.masked_fill(~known, 0.0)
        centred = (value - _mean(value, known, cu_seqlens)).masked_fill(~known, 0.0)
        deviation = _mean(centred.square(), known, cu_seqlens).sqrt().clamp(min=1e-3)
        target = HEADROOM + centred / deviation
    error = (logit - target).masked_fill(~known, 0.0)
    return error.square().sum() / known.sum().clamp(min=1)


def _mean(x: Tensor, known: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Mean of x [B, T, H], zero where it is not known, over the known tokens of each text: [B, 1 | T, H]."""
    if cu_seqlens is None:
        return x.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    mean = document_sums(x[0], cu_seqlens) / document_counts(known[0], cu_seqlens).clamp(min=1)
    return mean[document_of_tokens(cu_seqlens, x.shape[1])][None]
