"""Column statistics by the definition: the whole matrix of probabilities, then its far entries."""

import torch
from torch import Tensor


def column_statistics(
    q: Tensor,
    k: Tensor,
    log_sum_exp: Tensor | None = None,
    *,
    window: int,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    need_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See `hybridize_kernels.column_statistics`; fp64 inputs are computed and returned in fp64."""
    heads = k.shape[2]
    logits, seen, distance = _logits(q, k, positions, cu_seqlens, scale)
    if logits.numel() == 0:
        return logits.new_empty(k.shape[:3]), logits.new_empty(k.shape[:3]) if need_sum else None
    if log_sum_exp is None:
        log_sum_exp = logits.masked_fill(~seen, -torch.inf).logsumexp(-1).transpose(1, 2)
    log_probability = logits - log_sum_exp.to(logits.dtype).transpose(1, 2)[..., None]
    log_probability = log_probability.masked_fill(~(seen & (distance >= window)), -torch.inf)
    log_probability = log_probability.unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, G·T, T]
    largest = log_probability.amax(2).transpose(1, 2)
    return largest, log_probability.exp().sum(2).transpose(1, 2) if need_sum else None


def attention_log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `hybridize_kernels.attention_log_sum_exp`."""
    logits, seen, _ = _logits(q, k, positions, cu_seqlens, scale)
    return logits.masked_fill(~seen, -torch.inf).logsumexp(-1).transpose(1, 2)


def _logits(
    q: Tensor, k: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[B, HQ, T, T]`, which pairs full causal attention sees and their distance in tokens, `[B, 1, T, T]`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, time, query_heads, size = q.shape
    document = torch.zeros(batch, time, dtype=torch.int64, device=q.device)
    if positions is None:
        positions = torch.arange(time, device=q.device).expand(batch, -1)
    if cu_seqlens is not None:
        for start in cu_seqlens[1:].tolist():
            document[:, start:] += 1
        first = cu_seqlens.long()[document.clamp(max=len(cu_seqlens) - 2)]
        positions = torch.where(document < len(cu_seqlens) - 1, positions - first, -1)
    keys = k.repeat_interleave(query_heads // k.shape[2], dim=2).to(dtype)
    logits = (size**-0.5 if scale is None else scale) * torch.einsum("bthd,bshd->bhts", q.to(dtype), keys)
    distance = (positions[:, :, None] - positions[:, None, :])[:, None]
    same = (document[:, :, None] == document[:, None, :])[:, None]
    return logits, same & (positions >= 0)[:, None, None, :] & (distance >= 0), distance
