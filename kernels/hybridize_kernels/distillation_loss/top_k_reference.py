"""The divergence from a teacher's most probable tokens, with all logits at once."""

import torch
from torch import Tensor


def top_k_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    top_ids: Tensor,
    top_log_probs: Tensor,
    *,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    student_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridize_kernels.top_k_distillation_loss`; `chunk_tokens` means nothing here."""
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    logits = student_hidden.to(dtype) @ student_head.to(dtype).T  # [..., vocabulary]
    if student_bias is not None:
        logits = logits + student_bias.to(dtype)
    ids = top_ids.long()
    log_p = top_log_probs.detach().to(dtype)
    log_mass = log_p.logsumexp(-1, keepdim=True)
    has_tail = ids.shape[-1] < logits.shape[-1]
    p = (log_p - (log_mass.clamp(min=0) if has_tail else log_mass)).exp()

    log_q = logits.log_softmax(-1)
    divergence = (torch.xlogy(p, p) - p * log_q.gather(-1, ids)).sum(-1)
    if has_tail:
        tail_p = (1 - p.sum(-1)).clamp(min=0)
        log_tail_q = log_q.scatter(-1, ids, float("-inf")).logsumexp(-1)
        divergence = divergence + torch.xlogy(tail_p, tail_p) - tail_p * log_tail_q
    agrees = (logits.argmax(-1) == ids[..., 0]).to(dtype)

    counted = torch.ones_like(divergence) if mask is None else mask.to(dtype)
    tokens = counted.sum().clamp(min=1)
    return (divergence * counted).sum() / tokens, (agrees * counted).sum() / tokens
