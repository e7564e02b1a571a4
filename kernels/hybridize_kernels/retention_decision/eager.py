"""The decision on each token in plain PyTorch.

This file imports nothing but torch: exported models carry it.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RetentionDecision(NamedTuple):
    """What a text's logits decide.

    Attributes:
        decided: `[B, T, H]`, the scores on their grid; 0 where a token is not decided.
        budget_loss: a scalar.
        kept_share: `[H]` fp32, the share of the decided tokens that is kept; without gradient. Of packed documents, the
            mean number of tokens kept of those that count, over `scored_tokens` (over 1 at least).
        scored_tokens: decided tokens of a row without padding; of packed documents a scalar, the mean of those that
            count.
    """

    decided: Tensor
    budget_loss: Tensor
    kept_share: Tensor
    scored_tokens: int | Tensor


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
    """r = sigmoid(x) − 1/2 or max(x, 0), rounded straight-through, 0 for the last `margin` tokens of a text.

    logit: `[B, T, H]`; l1_weight: `[H or 1]`, of a loss on max(r + l1_margin, 0); positions: `[B, T]`, −1 for padding,
    or None; cu_seqlens: `[N + 1]`, the bounds of documents of one row, or None; of these the ones of more than
    `longer_than` tokens count for the share.
    """
    logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
    value = torch.sigmoid(logit) - 0.5 if score == "sigmoid" else torch.relu(logit)
    complete = _complete(logit, margin, positions, cu_seqlens)[..., None]
    num_complete = complete.expand(*logit.shape[:2], 1).sum().clamp(min=1)
    kept = (value > 0) & complete
    scored: int | Tensor = max(logit.shape[1] - margin, 0)
    if cu_seqlens is None:
        share = kept.sum((0, 1)) / num_complete
    else:
        lengths = cu_seqlens.diff()
        counts, number, scored = counted_documents(lengths, margin, longer_than)
        of_token = counts[document_of_tokens(cu_seqlens, logit.shape[1])]
        share = (kept[0] * of_token[:, None]).sum(0) / number / scored.clamp(min=1.0)
    positive = torch.where(complete, (value + l1_margin).clamp(min=0), 0.0).sum((0, 1)) / num_complete
    loss = (l1_weight * positive).mean()
    rounded = torch.round(value.detach() * steps_per_unit) / steps_per_unit
    on_grid = value + (rounded - value).detach() if value.requires_grad else rounded
    return RetentionDecision(torch.where(complete, on_grid, 0.0), loss, share.float(), scored)


def document_of_tokens(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """`[T]` int64, the number of the document that each token belongs to. Nothing is asked of the device."""
    token = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:-1], token, right=True)


def counted_documents(lengths: Tensor, margin: int, longer_than: int) -> tuple[Tensor, Tensor, Tensor]:
    """lengths `[N]` -> which documents count `[N]`, 1 or 0, how many do, and the mean of their decided tokens; fp32."""
    long = lengths > longer_than
    counts = torch.where(long.any(), long, lengths > 0).float()  # empty ones only fill up the bounds
    number = counts.sum()
    return counts, number, ((lengths - margin).clamp(min=0) * counts).sum() / number


def _complete(logit: Tensor, margin: int, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`[B or 1, T]` bool: which tokens are decided."""
    num_tokens = logit.shape[1]
    if positions is not None:
        return (positions >= 0) & (positions <= positions.amax(1, keepdim=True) - margin)
    token = torch.arange(num_tokens, device=logit.device)[None]
    if cu_seqlens is None:
        return token < num_tokens - margin
    bounds = cu_seqlens.to(logit.device)
    return token < (bounds[1:] - margin)[document_of_tokens(bounds, num_tokens)]
