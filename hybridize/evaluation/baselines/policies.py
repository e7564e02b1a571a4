"""What a token is worth to each policy. Sources are in README.md."""

from __future__ import annotations

import torch
from torch import Tensor

RECENT_QUERIES = 32
POOL_TOKENS = 7
STEPS_PER_OCTAVE = 256
"""Key norms that are apart by less count as equal: 0.3 per cent."""


def fixed_worth(policy: str, keys: Tensor, positions: Tensor, *, layer: int, seed: int) -> Tensor:
    """The worth of tokens for policies that never change their mind, positive; 1 for the others, which have other ways.

    Args:
        keys: [B, T, H, D], before rotary embedding. positions: [T].

    Returns:
        fp32 [B, T, H].
    """
    if policy == "key_norm":
        octaves = keys.float().norm(dim=-1).clamp(min=1e-20).log2()
        # Rounded, lest the last bit of a product decide between equal words.
        worth: Tensor = (-octaves * STEPS_PER_OCTAVE).round().div(STEPS_PER_OCTAVE).exp2()
        return worth
    if policy == "random":
        heads = torch.arange(keys.shape[2], device=keys.device)
        mixed = _hash(positions[:, None] * 0x1F123BB5 + heads * 0x5F356495 + layer * 0x2545F491 + seed * 0x632BE59B)
        return ((mixed + 1).float() / 2**24).expand(keys.shape[0], -1, -1)
    return keys.new_ones(keys.shape[:3], dtype=torch.float32)


def _hash(x: Tensor) -> Tensor:
    """int64 -> 0 .. 2²⁴ − 1, the same on every device (multiply and shift, as in xorshift*)."""
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        x = (x ^ ((x >> 15) & 0x1FFFF)) * multiplier & 0xFFFFFFFF
    return (x ^ (x >> 12)) & 0xFFFFFF


def num_queries(policy: str) -> int:
    """How many of the last queries a policy asks when it chooses."""
    return {"recent_attention": RECENT_QUERIES, "last_attention": 1}.get(policy, 0)


def smoothed(policy: str, worth: Tensor, positions: Tensor) -> Tensor:
    """Worth and positions [B, H, S] of tokens that compete, in order of position -> [B, H, S].

    For `recent_attention` each has the largest worth among those of the POOL_TOKENS positions around it, so that what
    stands around an important token stays with it. Tokens between which others were evicted are no neighbours.
    """
    if policy != "recent_attention":
        return worth
    largest = worth.clone()
    reach = POOL_TOKENS // 2
    for steps in range(1, reach + 1):
        far = positions[:, :, steps:] - positions[:, :, :-steps] > reach
        from_before, from_after = (other.masked_fill(far, 0.0) for other in (worth[:, :, :-steps], worth[:, :, steps:]))
        largest[:, :, steps:] = largest[:, :, steps:].maximum(from_before)
        largest[:, :, :-steps] = largest[:, :, :-steps].maximum(from_after)
    return largest
