"""Blocks of native sparse attention at some query positions: what attention they hold, and which the rule selects.

The rule is that of `hybridize_kernels.native_sparse_attention`, whose kernels never write down what they choose.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_mass(
    q: Tensor, k: Tensor, positions: Tensor, *, scale: float, block_tokens: int, window: int, own_window: int | None
) -> Tensor:
    """The probability of causal attention that lies outside a window, by block.

    Args:
        q: [n, HQ, D] of the queries at `positions` [n]. k: [T, H, D], all keys. Rotary embedding applied.
        window: tokens that do not count, the query itself included.
        own_window: what the attention itself sees, in tokens; None: everything before.

    Returns:
        [H, n, blocks] fp32, summed over the query heads of a key head.
    """
    num_keys = len(k)
    distance = positions[:, None] - torch.arange(num_keys, device=k.device)  # [n, T]
    seen = distance >= 0 if own_window is None else (distance >= 0) & (distance < own_window)
    logits = _logits(q, k, scale).masked_fill(~seen, -torch.inf)  # [H, G, n, T]
    outside = logits.softmax(-1).sum(1).masked_fill(distance < window, 0.0)
    whole = F.pad(outside, (0, -num_keys % block_tokens))
    mass: Tensor = whole.reshape(*whole.shape[:2], whole.shape[-1] // block_tokens, block_tokens).sum(-1)
    return mass


def compressed_importance(
    q: Tensor, k: Tensor, positions: Tensor, *, scale: float, block_tokens: int, pooling: Tensor | None
) -> Tensor:
    """What a student goes by: the probability of its compressed branch, summed over the query heads of a key head.

    Args:
        q, k, positions: as in `attention_mass`.
        pooling: [block_tokens, H, D], the weights that pool the keys of a block; None: their mean.

    Returns:
        [H, n, blocks] fp32, 0 for blocks that are not complete at a query.
    """
    num_keys = len(k)
    whole = num_keys // block_tokens
    keys = k[: whole * block_tokens].float().reshape(whole, block_tokens, *k.shape[1:])  # [whole, block, H, D]
    pooled = keys.mean(1) if pooling is None else (pooling.float() * keys).sum(1)
    pooled = pooled.to(k.dtype).float()  # rounded as in the cache
    complete = torch.arange(whole, device=k.device) < ((positions + 1) // block_tokens)[:, None]  # [n, whole]
    # Finite: where no block is complete the softmax is over nothing, and set to zero after it.
    logits = _logits(q, pooled, scale).masked_fill(~complete, torch.finfo(torch.float32).min)
    probability = logits.softmax(-1).masked_fill(~complete, 0.0).sum(1)
    return F.pad(probability, (0, -(-num_keys // block_tokens) - whole))


def selected(importance: Tensor, positions: Tensor, *, block_tokens: int, count: int) -> Tensor:
    """The first, the previous and the current block, then the most important of those between, up to `count` in all.

    Args:
        importance: [H, n, blocks]; of equals the earlier block wins. positions: [n], of the queries.

    Returns:
        bool [H, n, blocks].
    """
    block = torch.arange(importance.shape[-1], device=importance.device)
    current = (positions // block_tokens)[:, None]
    forced = (block == 0) | (block == current) | (block == current - 1)  # [n, blocks]
    free = (block > 0) & (block < current - 1)
    order = importance.masked_fill(~free, -1.0).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    return forced | (free & (rank < count - forced.sum(-1, keepdim=True)))


def _logits(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """q [n, HQ, D], keys [S, H, D] -> [H, G, n, S] fp32."""
    heads, group = keys.shape[1], q.shape[1] // keys.shape[1]
    query = q.float().reshape(len(q), heads, group, q.shape[-1]).permute(1, 2, 0, 3)  # [H, G, n, D]
    return scale * (query @ keys.float().permute(1, 2, 0)[:, None])
