"""What a token will be worth: the attention that later queries pay to it once it has left the window.

A scorer regressed on this learns what to keep without a backward pass through the model. The target is the largest
probability that any query of the group gives to the key, on a logarithmic scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_CHUNK = 256


@torch.no_grad()
def future_attention(
    q: Tensor, k: Tensor, *, window: int, positions: Tensor, scale: float, chunk: int = QUERY_CHUNK
) -> Tensor:
    """Logarithm of the largest full-attention probability that a query at distance >= window gives each key.

    Args:
        q: [B, T, HQ, D], k: [B, T, H, D], RoPE applied. positions: [B, T], -1 for padding.
        window: tokens; scale: factor on q·k; chunk: queries at a time, which bounds the memory.

    Returns:
        [B, T, H] float32; -inf where no query is that far.
    """
    batch, num_tokens, num_heads, _ = k.shape
    grouped = q.unflatten(2, (num_heads, -1)).float() * scale  # [B, T, H, G, D]
    keys = k.float()
    key_position = positions[:, None, None, None, :]
    best = torch.full((batch, num_heads, num_tokens), -torch.inf, device=q.device)
    # A token's position is at most its column, so queries of the first `window` columns are near to everything.
    for start in range(min(window, num_tokens), num_tokens, chunk):
        stop = min(start + chunk, num_tokens)
        with torch.autocast(q.device.type, enabled=False):
            logits = torch.einsum("bthgd,bshd->bhgts", grouped[:, start:stop], keys)
        query_position = positions[:, None, None, start:stop, None]
        causal = (key_position >= 0) & (key_position <= query_position)
        logits = logits.masked_fill(~causal, -torch.inf)
        log_probability = logits - logits.logsumexp(-1, keepdim=True)
        far = causal & (query_position - key_position >= window)
        best = torch.maximum(best, log_probability.masked_fill(~far, -torch.inf).amax((2, 3)))
    return best.transpose(1, 2)


def retention_target_loss(logit: Tensor, future: Tensor, positions: Tensor, *, budget: int, sinks: int) -> Tensor:
    """Mean squared error between the scorer's logits and the future attention, standardised per row and head.

    The target is (future - threshold) / deviation, where the threshold lies below the `budget` - `sinks` largest: a
    logit above 0 then means "among those that the budget holds". Sinks stay anyway and do not count.

    Args:
        logit, future: [B, T, H]. positions: [B, T].

    Returns:
        A scalar; 0 if the sequences are too short for any target.
    """
    with torch.no_grad():
        known = future.isfinite() & (positions >= sinks)[..., None]
        count = known.sum(1, keepdim=True)  # [B, 1, H]
        value = future.masked_fill(~known, 0.0)
        mean = value.sum(1, keepdim=True) / count.clamp(min=1)
        variance = ((value - mean) ** 2).masked_fill(~known, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
        deviation = variance.sqrt().clamp(min=1e-3)
        ordered = future.masked_fill(~known, -torch.inf).sort(dim=1, descending=True).values
        held = count.clamp(max=max(budget - sinks, 1))
        last_in = ordered.gather(1, (held - 1).clamp(min=0))
        first_out = ordered.gather(1, held.clamp(max=ordered.shape[1] - 1))
        # Where the budget holds all of them, the whole standardised range lies above 0.
        threshold = torch.where(held < count, (last_in + first_out) / 2, last_in - deviation)
        target = ((value - threshold) / deviation).masked_fill(~known, 0.0)
    error = (logit - target).masked_fill(~known, 0.0)
    return (error**2).sum() / known.sum().clamp(min=1)
