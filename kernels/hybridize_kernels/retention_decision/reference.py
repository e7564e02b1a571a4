"""The decision on each token as its rule, text by text and head by head."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .eager import RetentionDecision


def retention_decision(
    logit: Tensor,
    l1_weight: Tensor,
    *,
    score: str,
    steps_per_unit: float,
    margin: int,
    l1_margin: float = 0.0,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longer_than: int = 0,
) -> RetentionDecision:
    """See `hybridize_kernels.retention_decision`; what the other forms must equal."""
    dtype = torch.promote_types(logit.dtype, torch.float32)
    batch, num_tokens, heads = logit.shape
    decided = torch.zeros_like(logit, dtype=dtype)
    texts = _texts(batch, num_tokens, positions, cu_seqlens)
    ends = [max(0, len(columns) - margin) for _, columns in texts]  # so many of a text's tokens are decided
    number = max(1, sum(ends))
    counts = [cu_seqlens is not None and len(columns) > longer_than for _, columns in texts]
    counts = counts if any(counts) else [True] * len(texts)
    loss = torch.zeros((), dtype=dtype, device=logit.device)
    share = torch.zeros(heads, dtype=dtype, device=logit.device)
    for (row, columns), end, counted in zip(texts, ends, counts, strict=True):
        for head in range(heads):
            x = logit[row, columns[:end], head].to(dtype)
            r = 1 / (1 + torch.exp(-x)) - 0.5 if score == "sigmoid" else x * (x > 0)
            step = torch.round(r * steps_per_unit) / steps_per_unit
            decided[row, columns[:end], head] = r + (step - r).detach()
            weight = l1_weight[head if len(l1_weight) > 1 else 0].to(dtype)
            reached = r + l1_margin
            loss = loss + weight * (reached * (reached >= 0)).sum() / number / heads
            share[head] += counted * (r > 0).sum()
    if cu_seqlens is None:
        return RetentionDecision(decided, loss, (share / number).float(), max(0, num_tokens - margin))
    scored = sum(end for end, counted in zip(ends, counts, strict=True) if counted) / sum(counts)
    share = (share / sum(counts) / max(1.0, scored)).float()
    return RetentionDecision(decided, loss, share, torch.tensor(scored, dtype=torch.float32, device=logit.device))


def _texts(
    batch: int, num_tokens: int, positions: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[int, list[int]]]:
    """Row and columns of each text's tokens, in order."""
    if cu_seqlens is not None:
        return [(0, list(range(first, end))) for first, end in pairwise(cu_seqlens.tolist())]
    if positions is None:
        return [(row, list(range(num_tokens))) for row in range(batch)]
    return [(row, [t for t, p in enumerate(places) if p >= 0]) for row, places in enumerate(positions.tolist())]
