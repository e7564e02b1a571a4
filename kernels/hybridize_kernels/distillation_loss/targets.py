"""What a teacher's distributions are kept as: its most probable tokens."""

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 26
"""Logits that exist at one time; several tensors of their size do."""


@torch.no_grad()
def top_k_targets(
    hidden: Tensor, head: Tensor, k: int, *, bias: Tensor | None = None, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """See `hybridize_kernels.top_k_targets`."""
    rows = hidden.flatten(0, -2)
    ids = torch.empty(rows.shape[0], k, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(rows.shape[0], k, dtype=torch.float32, device=hidden.device)
    head = head.to(hidden.dtype)
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS // max(1, head.shape[0]))
    for start in range(0, rows.shape[0], chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = (rows[chunk] @ head.T).float()
        if bias is not None:
            logits += bias.float()
        top, order = logits.topk(k, dim=-1)
        total = logits.logsumexp(-1, keepdim=True)
        # Equal ones come in any order: by their ids here, as argmax takes them.
        order, place = order.sort(dim=-1)
        top, rank = top.gather(-1, place).sort(dim=-1, descending=True, stable=True)
        ids[chunk], log_probs[chunk] = order.gather(-1, rank), top - total
    return ids.unflatten(0, hidden.shape[:-1]), log_probs.unflatten(0, hidden.shape[:-1])
