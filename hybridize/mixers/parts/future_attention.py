"""What a token will be worth: the attention that later queries pay to it once it has left the window.

A scorer regressed on this learns what to keep without a backward pass through the model. The target is the largest
probability that any query of the group gives to the key, on a logarithmic scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_CHUNK = 128
HEADROOM = 2.0
"""Standard deviations by which a token of average worth lies above the threshold of being kept."""


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
    grouped = (q.float() * scale).unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, H, G, T, D]
    keys = k.float().permute(0, 2, 3, 1)  # [B, H, D, T]
    best = torch.full((batch, num_heads, num_tokens), -torch.inf, device=q.device)
    # A token's position is at most its column, so queries of the first `window` columns are near to everything.
    for start in range(min(window, num_tokens), num_tokens, chunk):
        stop = min(start + chunk, num_tokens)
        num_far = stop - window  # columns that some query of the chunk may be far from
        with torch.autocast(q.device.type, enabled=False):
            logits = grouped[:, :, :, start:stop].flatten(2, 3) @ keys[..., :stop]
        logits = logits.unflatten(2, (-1, stop - start))  # [B, H, G, t, s]
        query_position = positions[:, None, None, start:stop, None]
        key_position = positions[:, None, None, None, :stop]
        causal = (key_position >= 0) & (key_position <= query_position)
        far = (causal & (query_position - key_position >= window))[..., :num_far]
        log_sum = logits.masked_fill_(~causal, -torch.inf).logsumexp(-1, keepdim=True)
        log_probability = logits[..., :num_far].sub_(log_sum).masked_fill_(~far, -torch.inf)
        best[..., :num_far] = torch.maximum(best[..., :num_far], log_probability.amax((2, 3)))
    return best.transpose(1, 2)


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
