"""Column statistics in plain PyTorch: a chunk of queries at a time against all earlier keys.

This file imports nothing but torch: exported models carry it.
"""

import torch
from torch import Tensor

QUERY_CHUNK = 128


@torch.no_grad()
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
    """Log of the largest, and the sum, of the full-attention probabilities that each key gets from beyond a window.

    q: `[B, T, HQ, D]`; k: `[B, T, H, D]`; log_sum_exp: `[B, T, HQ]` over every key a query sees, or None; positions:
    `[B, T]`, −1 is padding; cu_seqlens: the starts of packed documents and their end. Returns two `[B, T, H]` in fp32
    (−inf and 0 where no query is that far), the second None unless need_sum.
    """
    batch, time, heads, _ = k.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    document, positions = _documents(batch, time, positions, cu_seqlens, q.device)
    largest = torch.full((batch, heads, time), -torch.inf, dtype=dtype, device=q.device)
    summed = torch.zeros_like(largest) if need_sum else None
    # A token's position is at most its column, so queries of the first `window` columns are near to everything.
    for start in range(min(window, time), time, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, time)
        num_far = stop - window  # columns that some query of the chunk may be far from
        logits, seen = _logits(q, k, document, positions, start, stop, scale)
        query = positions[:, None, None, start:stop, None]
        far = (seen & (query - positions[:, None, None, None, :stop] >= window))[..., :num_far]
        if log_sum_exp is None:
            log_sum = logits.masked_fill_(~seen, -torch.inf).logsumexp(-1, keepdim=True)
        else:
            log_sum = log_sum_exp[:, start:stop].to(dtype).unflatten(2, (heads, -1)).permute(0, 2, 3, 1)[..., None]
        log_probability = logits[..., :num_far].sub_(log_sum).masked_fill_(~far, -torch.inf)
        torch.maximum(largest[..., :num_far], log_probability.amax((2, 3)), out=largest[..., :num_far])
        if summed is not None:
            summed[..., :num_far] += log_probability.exp_().sum((2, 3))
    return largest.transpose(1, 2), None if summed is None else summed.transpose(1, 2)


@torch.no_grad()
def attention_log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Natural log of the sum of exp(scale · q·k) over every key that full causal attention sees, `[B, T, HQ]`."""
    batch, time, query_heads, _ = q.shape
    document, positions = _documents(batch, time, positions, cu_seqlens, q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    result = torch.empty(batch, time, query_heads, dtype=dtype, device=q.device)
    for start in range(0, time, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, time)
        logits, seen = _logits(q, k, document, positions, start, stop, scale)
        log_sum = logits.masked_fill_(~seen, -torch.inf).logsumexp(-1)  # [B, H, G, t]
        result[:, start:stop] = log_sum.permute(0, 3, 1, 2).flatten(2)
    return result


def _logits(
    q: Tensor, k: Tensor, document: Tensor | None, positions: Tensor, start: int, stop: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Of queries start to stop: logits `[B, H, G, t, stop]` and which keys each sees `[B, 1, 1, t, stop]`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    query = (q[:, start:stop].to(dtype) * scale).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
    with torch.autocast(q.device.type, enabled=False):
        logits = query.flatten(2, 3) @ k[:, :stop].to(dtype).permute(0, 2, 3, 1)  # [B, H, G·t, stop]
    key_position = positions[:, None, None, None, :stop]
    seen = (key_position >= 0) & (key_position <= positions[:, None, None, start:stop, None])
    if document is not None:
        seen = seen & (document[:, None, None, None, :stop] == document[:, None, None, start:stop, None])
    return logits.unflatten(2, (-1, stop - start)), seen


def _documents(
    batch: int, time: int, positions: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """The document of each column, None where a row is one, and its position in it; both `[B, T]`."""
    column = torch.arange(time, device=device).expand(batch, -1)
    if cu_seqlens is None:
        return None, column if positions is None else positions
    document = torch.searchsorted(cu_seqlens.long(), column.contiguous(), right=True) - 1
    position = column - cu_seqlens.long()[document.clamp(max=len(cu_seqlens) - 1)]
    return document, torch.where(column < cu_seqlens[-1], position, -1)
