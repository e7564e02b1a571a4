"""The distillation loss with all logits at once."""

from typing import Literal

import torch
from torch import Tensor


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse", "mixed"] = "forward",
    chunk_tokens: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridize_kernels.distillation_loss`; `chunk_tokens` means nothing here."""
    student = _logits(student_hidden, student_head, student_bias)  # [..., vocabulary]
    teacher = _logits(teacher_hidden, teacher_head, teacher_bias).detach()
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    divergence = {"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}[direction]
    agrees = (student.argmax(-1) == teacher.argmax(-1)).to(divergence.dtype)

    counted = torch.ones_like(divergence) if mask is None else mask.to(divergence.dtype)
    tokens = counted.sum().clamp(min=1)
    loss = temperature**2 * (divergence * counted).sum() / tokens
    return loss, (agrees * counted).sum() / tokens


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ head.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)
