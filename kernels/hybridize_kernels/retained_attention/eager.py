"""Retained attention in plain PyTorch: a chunk of queries at a time over the keys that any of them sees.

The cap on retained tokens is turned into one number a key, the position from which it is evicted, so that the mask of a
chunk is three comparisons. This file imports nothing but torch: exported models carry it.
"""

import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_CHUNK = 512
CPU_QUERY_CHUNK = 192
NEVER = torch.iinfo(torch.int64).max


def retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retention_score: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    budget: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    ordered_from: int | None = None,
    cu_seqlens: Tensor | None = None,
    score_gradient: str = "straight_through",
    return_log_sum_exp: bool = False,
) -> Any:
    """Softmax attention over the last `window` tokens, the sinks and the retained tokens of each key head.

    q: `[B, T, HQ, D]`; k, v: `[B, S, H, D]`; retention_score: `[B, S, H]` or None; query_positions: `[B, T]`;
    key_positions: `[B, S]` or `[B, S, H]` (−1: padding, an empty slot). Query i sees key j when 0 <= pos_j <= pos_i and
    (pos_i − pos_j < window, or j is a sink or scores above 0 and is among the best `budget` of those that have left
    i's window). The score's gradient is that of a gate of value 1 on v. Without positions the queries are the last T of
    S keys in order; cu_seqlens `[N + 1]` bounds documents, of one row, that do not see each other; ordered_from is a
    hint that this form does not need. With return_log_sum_exp also the log-sum-exp `[B, T, HQ]` of each softmax.
    Another score_gradient is the package's own: here such a score gets none, and a warning says so.
    """
    if score_gradient != "straight_through" and retention_score is not None and retention_score.requires_grad:
        warnings.warn(f"{score_gradient} needs the package hybridize_kernels: no scorer is trained", stacklevel=2)
        retention_score = retention_score.detach()
    options = {"window": window, "sinks": sinks, "budget": budget, "scale": scale}
    if cu_seqlens is not None:
        results = [
            retained_attention(
                *(None if x is None else x[:, start:stop] for x in (q, k, v, retention_score)),  # type: ignore[arg-type]
                query_positions=None if query_positions is None else query_positions[:, start:stop],
                key_positions=None if key_positions is None else key_positions[:, start:stop],
                return_log_sum_exp=True,
                **options,  # type: ignore[arg-type]
            )
            for start, stop in pairwise(cu_seqlens.tolist())
        ]
        output, log_sum_exp = (torch.cat(x, dim=1) for x in zip(*results, strict=True))
        return (output, log_sum_exp) if return_log_sum_exp else output
    if key_positions is None or query_positions is None:
        key_positions = torch.arange(k.shape[1], device=k.device).expand(len(k), -1)
        query_positions = key_positions[:, k.shape[1] - q.shape[1] :]
    batch, time, query_heads, head_size = q.shape
    heads = k.shape[2]
    scale = head_size**-0.5 if scale is None else scale
    # Where every key head has the same positions and no score, one mask serves them all.
    positions = key_positions if key_positions.ndim == 3 else key_positions[..., None]
    positions = positions.transpose(1, 2)  # [B, 1 | H, S]
    score = torch.zeros_like(positions, dtype=q.dtype).transpose(1, 2) if retention_score is None else retention_score
    horizon = query_positions.amax(1)[:, None, None] - window if time else None
    evicted = _evicted(score.transpose(1, 2), positions.expand(batch, score.shape[2], -1), sinks, budget, horizon)
    if retention_score is not None:
        opened = torch.where(retention_score.isfinite(), retention_score - retention_score.detach(), 0.0)
        v = v * (1 + opened)[..., None].to(v.dtype)

    # One row of attention a key head, so that a mask broadcasts over the query heads of its group.
    group = query_heads // heads
    q = q.reshape(batch, time, heads, group, head_size).permute(0, 2, 3, 1, 4)  # [B, H, G, T, D]
    chunk = min(CPU_QUERY_CHUNK, QUERY_CHUNK) if q.device.type == "cpu" else QUERY_CHUNK
    outputs, sums = [], []
    # split, not indexing: the gradient of N slices of one tensor would be N tensors of its full size.
    for rows, query in zip(q.split(chunk, dim=3), query_positions.split(chunk, dim=1), strict=True):
        index = _seen(query, positions, evicted, window) if q.device.type == "cpu" else None
        if index is None:
            position, until = positions, evicted
            keys, values = k.transpose(1, 2), v.transpose(1, 2)  # [B, H, S, D]
        else:
            position, until = positions.expand(evicted.shape).gather(-1, index), evicted.gather(-1, index)
            keys, values = _rows(k, index), _rows(v, index)
        query = query[:, None, :, None]  # [B, 1, t, 1]
        mask = (position >= 0)[:, :, None, :] & (position[:, :, None, :] <= query)  # [B, 1 | H, t, S]
        # A key that is not kept has its own position for its eviction, which makes this the window as well.
        mask = mask & (until[:, :, None, :] > query - window)
        outputs.append(_attend(rows, keys, values, mask, scale))
        if return_log_sum_exp:
            sums.append(_log_sum_exp(rows, keys, mask, scale))
    output = torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)
    if return_log_sum_exp:
        return output, torch.cat(sums, dim=3).permute(0, 3, 1, 2).flatten(2, 3)
    return output


def _seen(query: Tensor, positions: Tensor, evicted: Tensor, window: int) -> Tensor | None:
    """int64 `[B, H, n]`: the keys that some query of a chunk sees, and others up to n; None if most are seen.

    query: `[B, t]`; positions `[B, 1 | H, S]`; evicted `[B, H, S]`.
    """
    if query.shape[1] == 0:
        return None
    first = torch.where(query >= 0, query, NEVER).amin(1)[:, None, None]
    last = query.amax(1)[:, None, None]
    seen = (positions >= 0) & (positions <= last) & (evicted > first - window)
    # A GPU would have to wait for this count; there the whole mask is the cheaper way.
    count = int(seen.sum(-1).max()) if seen.numel() else 0
    if 4 * count >= 3 * seen.shape[-1]:
        return None
    return seen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :count]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x `[B, S, H, D]` at index `[B, H, n]` -> `[B, H, n, D]`; a gather along one dimension has a fast gradient."""
    batch, keys, heads, size = x.shape
    head = torch.arange(heads, device=x.device)[:, None]
    row = torch.arange(batch, device=x.device)[:, None, None] * keys + index
    flat = (row * heads + head).flatten()[:, None].expand(-1, size)
    return x.flatten(0, 2).gather(0, flat).view(batch, heads, -1, size)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q `[B, H, G, t, D]`, k and v `[B, H, S, D]`, mask `[B, 1 | H, t, S]` -> `[B, H, G, t, D]`; blind rows give 0."""
    batch, heads, group = q.shape[:3]
    if k.shape[2] == 0:
        return (q * 0).sum(-1, keepdim=True).expand(*q.shape[:-1], v.shape[-1])
    blind = ~mask.any(-1, keepdim=True)
    mask = (mask | blind).expand(batch, heads, -1, -1)
    output = F.scaled_dot_product_attention(
        q.flatten(0, 1),  # [B·H, G, t, D]
        k.flatten(0, 1)[:, None].expand(-1, group, -1, -1),
        v.flatten(0, 1)[:, None].expand(-1, group, -1, -1),
        attn_mask=mask.flatten(0, 1)[:, None],
        scale=scale,
    )
    return output.view(batch, heads, *output.shape[1:]).masked_fill(blind[:, :, None], 0.0)


def _log_sum_exp(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q `[B, H, G, t, D]`, k `[B, H, S, D]`, mask `[B, 1 | H, t, S]` -> `[B, H, G, t]`, -inf of blind rows."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = scale * torch.einsum("bhgtd,bhsd->bhgts", q.to(dtype), k.to(dtype))
    blind = ~mask.any(-1, keepdim=True)
    log_sum = logits.masked_fill(~(mask | blind)[:, :, None], float("-inf"))
    log_sum = log_sum.logsumexp(-1) if k.shape[2] else logits.sum(-1)
    return log_sum.masked_fill(blind[:, :, None, :, 0], float("-inf"))


def eviction_position(score: Tensor, key_positions: Tensor, *, sinks: int, budget: int | None, window: int) -> Tensor:
    """int64 `[B, S, H]`: query i retains key j outside its window exactly when pos_i − window < its value at j.

    The window shifts all boundaries alike and does not enter. score: `[B, S, H]`; key_positions: `[B, S]` or with `H`.
    """
    if key_positions.ndim == 2:
        key_positions = key_positions[..., None].expand(score.shape)
    return _evicted(score.transpose(1, 2), key_positions.transpose(1, 2), sinks, budget, None).transpose(1, 2)


def _evicted(score: Tensor, position: Tensor, sinks: int, budget: int | None, horizon: Tensor | None) -> Tensor:
    """Eviction positions `[B, H, S]`, right up to the horizon `[B, 1, 1]`, the last position that has left a window."""
    score = score.detach()
    sink = (position >= 0) & (position < sinks)
    kept = sink | ((score > 0) & (position >= 0))
    keys = score.shape[-1]
    uncapped = torch.where(kept, NEVER, position)
    if budget is None or keys <= budget:
        return uncapped
    if score.device.type == "cpu":
        # A decoding cache holds little more than its budget: most steps need no ranking. (A GPU would have to wait.)
        counted = kept if horizon is None else kept & (position <= horizon)
        if int(counted.sum(-1).max()) <= budget:
            return uncapped
    if budget == 0:
        return position

    position, by_position = position.sort(dim=-1, stable=True)
    kept, sink = kept.gather(-1, by_position), sink.gather(-1, by_position)
    # The ranking: kept keys first, by score, the earlier on a tie.
    value = score.gather(-1, by_position).masked_fill(sink, float("inf")).masked_fill(~kept, float("-inf"))
    by_rank = value.argsort(dim=-1, descending=True, stable=True)
    filled = _position_of_better(by_rank, kept, position, budget)
    evicted = torch.where(kept, torch.maximum(filled, position), position)
    return torch.empty_like(evicted).scatter_(-1, by_position, evicted)


def _position_of_better(by_rank: Tensor, kept: Tensor, position: Tensor, count: int) -> Tensor:
    """For each key the position at which `count` kept keys of a better rank have been met, NEVER if there are fewer.

    All `[B, H, S]`, the keys in order of position; by_rank holds the key at each rank.
    """
    keys = by_rank.shape[-1]
    rank = torch.empty_like(by_rank)
    rank.scatter_(-1, by_rank, torch.arange(keys, device=rank.device).expand_as(by_rank))
    # Better keys are counted by blocks of positions, then inside the one block where the count fills up.
    block = max(1, int(keys**0.5))
    blocks = -(-keys // block)
    member = torch.zeros(*rank.shape, blocks, dtype=torch.int32, device=rank.device)  # [B, H, rank, block]
    member.scatter_(-1, (by_rank // block)[..., None], kept.gather(-1, by_rank)[..., None].int())
    better = member.cumsum(-2, dtype=torch.int32) - member  # kept keys of a block that rank before a rank
    better = better.cumsum(-1, dtype=torch.int32)  # ... up to the end of that block
    better = better.gather(-2, rank[..., None].expand(*rank.shape, blocks))  # [B, H, key, block]
    full_block = (better < count).sum(-1)  # the first block by whose end `count` better keys have been met
    inside = full_block.clamp(max=blocks - 1)
    missing = count - F.pad(better, (1, 0)).gather(-1, inside[..., None])  # [B, H, key, 1]
    index = inside[..., None] * block + torch.arange(block, device=rank.device)  # [B, H, key, block]
    beyond = index >= keys
    index = index.clamp(max=keys - 1)
    beats = (_take(rank, index) < rank[..., None]) & _take(kept, index) & ~beyond
    step = (beats.int().cumsum(-1) < missing).sum(-1, keepdim=True).clamp(max=block - 1)
    filled = _take(position, index.gather(-1, step)).squeeze(-1)
    return torch.where(full_block < blocks, filled, NEVER)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x `[B, H, S]` at index `[B, H, S, n]`."""
    return x.gather(-1, index.flatten(-2)).view(index.shape)
