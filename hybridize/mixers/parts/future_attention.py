"""What a token will be worth: the attention that later queries pay to it once it has left the window.

A scorer regressed on this learns what to keep without a backward pass through the model. The target is the largest
probability that any query of the group gives to the key, by its logarithm, or by its expected value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hybridize.mixers.configs.token_eviction import FutureTarget
from hybridize.mixers.parts.documents import sums_of_texts
from hybridize_kernels import column_statistics

HEADROOM = 2.0
"""Standard deviations by which a token of average worth lies above the threshold of being kept."""
PROBABILITY_THRESHOLD = 8.0
"""With the target "probability", tokens that later queries look at with less than exp of minus this are not kept."""
PROBABILITY_UNIT = 2.0
"""Natural logarithms of odds in a unit of the scorer's output: what a sigmoid of it can tell apart reaches further."""


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
    logit: Tensor,
    future: Tensor,
    positions: Tensor,
    *,
    sinks: int,
    cu_seqlens: Tensor | None = None,
    target: FutureTarget = "logarithm",
) -> Tensor:
    """How far the scorer's logits are from the future attention. Sinks stay anyway and do not count.

    "logarithm": the mean squared error to HEADROOM + (future - mean) / deviation, standardised per text and head, so
    that nearly every token is kept while there is room and the ranking decides when the cap binds. (A threshold at the
    budget's quantile leaves slots empty: a regression shrinks towards the mean, which lies far below that quantile.)

    "probability": the cross entropy of p = exp(future), so that a logit x says log odds of its expected value,
    PROBABILITY_UNIT · x - PROBABILITY_THRESHOLD. A token that is seldom looked at, but then by all of a query's
    attention, ranks by this before one that is always looked at a little; by the mean logarithm after it.

    Args:
        logit, future: [B, T, H]. positions: [B, T].
        cu_seqlens: [N + 1], the bounds of documents of one row, each a text; None: a row is one.

    Returns:
        A scalar; 0 if the sequences are too short for any target.
    """
    known = future.isfinite() & (positions >= sinks)[..., None]
    if target == "probability":
        odds = PROBABILITY_UNIT * logit - PROBABILITY_THRESHOLD
        error = functional.binary_cross_entropy_with_logits(odds, future.exp(), reduction="none")
        return error.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)
    with torch.no_grad():
        value = future.masked_fill(~known, 0.0)
        centred = (value - _mean(value, known, cu_seqlens)).masked_fill(~known, 0.0)
        deviation = _mean(centred.square(), known, cu_seqlens).sqrt().clamp(min=1e-3)
        wanted = HEADROOM + centred / deviation
    error = (logit - wanted).masked_fill(~known, 0.0)
    return error.square().sum() / known.sum().clamp(min=1)


def _mean(x: Tensor, known: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Mean of x [B, T, H], zero where it is not known, over the known tokens of each text: [B, 1 | T, H]."""
    return sums_of_texts(x, cu_seqlens) / sums_of_texts(known, cu_seqlens).clamp(min=1)
