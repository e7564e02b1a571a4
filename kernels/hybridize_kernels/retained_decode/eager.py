"""A decoding step of retained attention in plain PyTorch: in place, and without waiting for the device.

This file imports nothing but torch: exported models carry it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def retained_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    last_position: Tensor,
    *,
    window: int,
    sinks: int = 0,
    positions: Tensor,
    scale: float | None = None,
    scores: Tensor | None = None,
    retained_positions: Tensor | None = None,
    num_retained: Tensor | None = None,
    fresh_score: Tensor | None = None,
    margin: int = 0,
    workspace: dict[str, Tensor] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Takes one token a row into a cache `[B, H, W + C, D]` (updated in place) and attends from it.

    q: `[B, 1, HQ, D]`; k, v: `[B, 1, H, D]`; last_position: `[B]`; positions: `[B, 1]`, −1 for padding; scores:
    `[B, H, W + C]`, retained_positions: `[B, H, C]`, num_retained: `[B, H]`, fresh_score: `[B, H]` or None. Slots
    [0, W) are a ring, position p in slot p mod W; the others hold retained tokens. The workspace is not needed here.
    rotary: cos and sin `[B or 1, 1, R]`, given where q and k are those before RoPE.
    """
    if rotary is not None:
        q, k = (_rotated(x, *(table.unsqueeze(2) for table in rotary)) for x in (q, k))
    batch, _, query_heads, head_size = q.shape
    heads, slots = keys.shape[1:3]
    position = positions.long()[:, :, None]  # [B, 1, 1], as `real`, `ring` and `leaving`
    real = position >= 0
    ring = (position % window).expand(-1, heads, -1)
    leaving = position - window
    if scores is None or retained_positions is None or num_retained is None:
        target = leaving.expand(-1, heads, -1)
        admitted = (leaving >= 0) & (leaving < sinks)
        num_slots = (leaving + 1).clamp(0, sinks)  # [B, 1, 1]
    else:
        if fresh_score is not None and margin > 0:
            final = position - margin
            slot = (final % window).expand(-1, heads, -1)
            _put(scores, slot, fresh_score[..., None], real & (final >= 0))
        score = scores.gather(2, ring)  # [B, H, 1]
        target, admitted = _admit(score, leaving, scores[:, :, window:], retained_positions, num_retained, sinks)
        if slots > window:
            _put(scores, window + target, score, admitted)
            _put(retained_positions, target, leaving, admitted)
        num_retained += (admitted & (target == num_retained[..., None])).squeeze(-1)
        fresh = fresh_score[..., None] if fresh_score is not None and margin == 0 else torch.zeros_like(score)
        _put(scores, ring, fresh, real)
        num_slots = num_retained[..., None]
    for cache, new in ((keys, k), (values, v)):
        if slots > window:
            moved = cache.gather(2, ring[..., None].expand(-1, -1, -1, head_size))
            _put(cache, window + target, moved, admitted)
        _put(cache, ring, new.transpose(1, 2), real)
    last_position.copy_(torch.where(real.view(batch), position.view(batch), last_position))

    slot = torch.arange(slots, device=q.device)
    # [B, 1 | H, S]: the ring as far as it is filled, and the retained slots.
    seen = torch.where(slot < window, slot <= position, slot < window + num_slots)
    group = q.reshape(batch, heads, query_heads // heads, head_size)
    mask = (seen | ~real)[:, :, None].expand(-1, heads, -1, -1)
    output = F.scaled_dot_product_attention(group, keys.to(q.dtype), values.to(q.dtype), attn_mask=mask, scale=scale)
    return output.masked_fill(~real[..., None], 0.0).reshape(q.shape)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the op `rotary`, bit for bit: a pair's two numbers lie R/2 apart, what follows the first R passes through."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    y = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return torch.cat((y, rest), dim=-1)


def _admit(
    score: Tensor, leaving: Tensor, scores: Tensor, positions: Tensor, num_retained: Tensor, sinks: int
) -> tuple[Tensor, Tensor]:
    """The slot `[B, H, 1]` of 0 .. C - 1 for the token that leaves the ring, and whether it gets it.

    score: `[B, H, 1]` of that token. leaving: `[B, 1, 1]`, its position, below 0 if there is none. scores, positions:
    `[B, H, C]` of the retained tokens.
    """
    count, capacity = num_retained[..., None].long(), positions.shape[-1]
    kept = (leaving >= 0) & ((leaving < sinks) | (score > 0))
    if capacity == 0:
        return count, torch.zeros_like(kept)
    rank = torch.where(positions < sinks, torch.inf, scores)
    lowest = rank.amin(-1, keepdim=True)
    victim = torch.where(rank == lowest, positions, -2).argmax(-1, keepdim=True)  # of equals the latest
    free = count < capacity
    return torch.where(free, count, victim), kept & (free | (score > lowest))


def _put(x: Tensor, slot: Tensor, new: Tensor, valid: Tensor) -> None:
    """Writes new `[B, H, 1, ...]` to slot `[B, H, 1]` of x `[B, H, S, ...]` where valid `[B, 1 | H, 1]`."""
    shape = (*slot.shape, *(1,) * (x.ndim - 3))
    slot = slot.clamp(0, x.shape[2] - 1).view(shape).expand(-1, -1, -1, *x.shape[3:])
    valid = valid.expand(-1, slot.shape[1], -1).reshape(shape)
    x.scatter_(2, slot, torch.where(valid, new.to(x.dtype), x.gather(2, slot)))
