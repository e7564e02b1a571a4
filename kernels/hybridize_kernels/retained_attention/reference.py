"""Retained attention by brute force: every pair of keys compared for every query."""

from itertools import pairwise

import torch
from torch import Tensor

from .score_gradient import Gate

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
    return_log_sum_exp: bool = False,
    gate: Gate | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `hybridize_kernels.retained_attention`; the mask below is what the other forms must equal.

    gate: where a gate of value 1 stands whose gradient is that of the score; None: on the value, in the window too.
    """
    if cu_seqlens is not None:
        # What documents that do not see each other are: one call each.
        results = [
            retained_attention(
                q[:, start:stop],
                k[:, start:stop],
                v[:, start:stop],
                None if retention_score is None else retention_score[:, start:stop],
                window=window,
                sinks=sinks,
                budget=budget,
                query_positions=None if query_positions is None else query_positions[:, start:stop],
                key_positions=None if key_positions is None else key_positions[:, start:stop],
                scale=scale,
                return_log_sum_exp=True,
                gate=gate,
            )
            for start, stop in pairwise(cu_seqlens.tolist())
        ]
        output, log_sum_exp = (torch.cat(x, dim=1) for x in zip(*results, strict=True))
        return (output, log_sum_exp) if return_log_sum_exp else output

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if key_positions is None or query_positions is None:
        key_positions = torch.arange(k.shape[1], device=q.device).expand(len(k), -1)
        query_positions = key_positions[:, k.shape[1] - q.shape[1] :]
    positions = _per_head(key_positions, k.shape[2])
    visible = visible_keys(retention_score, query_positions, positions, window=window, sinks=sinks, budget=budget)
    visible = visible.repeat_interleave(group, dim=1)  # [B, HQ, T, S]

    opened = _opened(retention_score, positions, 0 if gate is None else sinks).to(dtype)
    opened = opened.transpose(1, 2).repeat_interleave(group, dim=1)[:, :, None]  # [B, HQ, 1, S]
    if gate is not None:
        left = query_positions[:, :, None] - positions[..., 0][:, None, :] >= window
        far = (left & (positions[..., 0] >= 0)[:, None, :])[:, None] & (query_positions >= 0)[:, None, :, None]
        opened = opened * far
    k, v = (x.repeat_interleave(group, dim=2).to(dtype) for x in (k, v))
    logits = scale * torch.einsum("bthd,bshd->bhts", q.to(dtype), k)
    if gate is not None and gate.on == "logit":
        logits = logits + opened  # the logarithm of a gate of value 1
    # Every row needs one finite logit for the softmax; a row without visible keys is zeroed after it.
    some = visible.any(-1, keepdim=True)
    weights = logits.masked_fill(~visible & some, float("-inf")).softmax(-1) if k.shape[1] else logits
    weights = torch.where(visible, weights, 0.0)
    through = weights if gate is not None and gate.on == "logit" else weights * (1 + opened)
    output = torch.einsum("bhts,bshd->bthd", through, v)
    # Of a row without visible keys: -inf, and no gradient.
    some = some.squeeze(-1)
    finite = logits.masked_fill(~visible & some[..., None], float("-inf"))
    log_sum_exp = finite.logsumexp(-1) if k.shape[1] else logits.sum(-1)
    log_sum_exp = torch.where(some, log_sum_exp, float("-inf"))
    if gate is not None and gate.hidden:
        # Keys of weight 0 whose gate is that of their weight, were they shown.
        would_be = torch.where(visible, 0.0, (logits - log_sum_exp[..., None]).sigmoid()).detach() * opened
        output = output + torch.einsum("bhts,bshd->bthd", would_be, v.detach())
        output = output - would_be.sum(-1).transpose(1, 2)[..., None] * output.detach()
        log_sum_exp = log_sum_exp + would_be.sum(-1)
    output = output.to(q.dtype)
    return (output, log_sum_exp.transpose(1, 2)) if return_log_sum_exp else output


def _opened(score: Tensor | None, positions: Tensor, sinks: int) -> Tensor:
    """Zeros `[B, S, H]` whose gradient is that of the score, where it is finite and the key is no sink."""
    if score is None:
        return torch.zeros(positions.shape, device=positions.device)
    free = score.isfinite() & (positions >= sinks)
    return torch.where(free, score - score.detach(), 0.0)


def visible_keys(
    score: Tensor | None,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    window: int,
    sinks: int,
    budget: int | None,
) -> Tensor:
    """Bool `[B, H, T, S]`: which keys each query sees. key_positions: `[B, S, H]`."""
    key = key_positions.transpose(1, 2)[:, :, None, :]  # [B, H, 1, S]
    query = query_positions[:, None, :, None]  # [B, 1, T, 1]
    causal = (key >= 0) & (key <= query)
    near = query - key < window
    kept, before = _kept_and_order(score, key_positions, sinks)
    retained = kept[:, :, None, :].expand(causal.shape)
    if budget is not None:
        left = kept[:, :, None, :] & (key <= query - window)  # [B, H, T, S]: kept keys that have left the window
        better = torch.einsum("bhtl,bhlj->bhtj", left.double(), before.double())
        retained = retained & (better < budget)
    return causal & (near | retained)


def eviction_position(score: Tensor, key_positions: Tensor, *, sinks: int, budget: int | None, window: int) -> Tensor:
    """See `hybridize_kernels.eviction_position`."""
    positions = _per_head(key_positions, score.shape[2])
    kept, before = _kept_and_order(score, positions, sinks)
    positions = positions.transpose(1, 2)  # [B, H, S]
    result = torch.where(kept, NEVER, positions)
    for b, h, j in kept.nonzero().tolist():
        better = positions[b, h][kept[b, h] & before[b, h, :, j]].sort().values
        if budget == 0:
            result[b, h, j] = positions[b, h, j]
        elif budget is not None and len(better) >= budget:
            result[b, h, j] = torch.maximum(better[budget - 1], positions[b, h, j])
    return result.transpose(1, 2)


def _kept_and_order(score: Tensor | None, positions: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
    """kept, bool `[B, H, S]`, and before, bool `[B, H, S, S]`: whether key l (first S) ranks before key j (last S)."""
    positions = positions.transpose(1, 2)
    sink = (positions >= 0) & (positions < sinks)
    values = torch.full(positions.shape, -1.0, dtype=torch.float64, device=positions.device)
    if score is not None:
        values = score.detach().transpose(1, 2).double()
    kept = sink | ((values > 0) & (positions >= 0))
    values = values.masked_fill(sink, float("inf"))
    first, second = values[..., :, None], values[..., None, :]
    earlier = positions[..., :, None] < positions[..., None, :]
    return kept, (first > second) | ((first == second) & earlier)


def _per_head(positions: Tensor, heads: int) -> Tensor:
    return positions if positions.ndim == 3 else positions[..., None].expand(-1, -1, heads)
