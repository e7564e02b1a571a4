"""The distillation loss in plain PyTorch, a chunk of tokens at a time.

The gradient of the logits has a closed form, so each chunk's gradients are taken while its logits exist: no logits are
kept for the backward pass and none are computed twice.
This file imports nothing but torch: exported models carry it.
"""

from typing import Any, Literal

import torch
from torch import Tensor

CPU_LOGITS = 1 << 22
"""Logits of a chunk on a CPU: few enough to stay in its caches and in memory that is handed out again at once."""


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse", "mixed"] = "forward",
    chunk_tokens: int = 1024,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean KL divergence of two next-token distributions times temperature², and their top-1 agreement.

    Hidden states `[N, d]` or `[B, T, d]`, heads `[vocabulary, d]`, biases `[vocabulary]`, mask bool `[N]` or `[B, T]`.
    forward is KL(teacher ‖ student), reverse KL(student ‖ teacher), mixed the mean of both. Two scalars.
    """
    student_hidden, teacher_hidden = student_hidden.flatten(0, -2), teacher_hidden.flatten(0, -2)  # [N, d]
    if mask is not None:
        index = mask.flatten().nonzero().squeeze(-1)
        student_hidden, teacher_hidden = student_hidden[index], teacher_hidden[index]
    loss, agreement = _Divergence.apply(
        student_hidden,
        student_head,
        student_bias,
        teacher_hidden,
        teacher_head,
        teacher_bias,
        float(temperature),
        direction,
        chunk_tokens,
    )
    return loss, agreement


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        teacher_bias: Tensor | None,
        temperature: float,
        direction: str,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        tokens = max(1, hidden.shape[0])
        loss, agreement = hidden.new_zeros((), dtype=dtype), hidden.new_zeros((), dtype=dtype)
        if hidden.device.type == "cpu":
            chunk_tokens = min(chunk_tokens, max(1, CPU_LOGITS // max(1, head.shape[0])))
        want_hidden, want_head, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_head = torch.zeros_like(head, dtype=dtype) if want_head else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if want_bias and bias is not None else None

        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            student = _logits(hidden[rows], head, bias, dtype)
            teacher = _logits(teacher_hidden[rows], teacher_head, teacher_bias, dtype)
            agreement += (student.argmax(-1) == teacher.argmax(-1)).sum()
            with torch.autocast(hidden.device.type, enabled=False):  # the sums over the vocabulary need their digits
                divergence, grad = _divergence(student, teacher, temperature, direction, any(ctx.needs_input_grad))
            loss += divergence
            if grad is None:
                continue
            grad = grad.div_(tokens)  # [chunk, vocabulary]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head.to(hidden.dtype)
            if grad_head is not None:
                grad_head += grad.T @ hidden[rows]

        ctx.grads = (grad_hidden, grad_head, grad_bias)
        ctx.dtypes = (hidden.dtype, head.dtype, None if bias is None else bias.dtype)
        agreement /= tokens
        ctx.mark_non_differentiable(agreement)
        return loss / tokens, agreement

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None, None)


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = (hidden @ head.to(hidden.dtype).T).to(dtype)
    return logits if bias is None else logits + bias.to(dtype)


def _divergence(
    student: Tensor, teacher: Tensor, temperature: float, direction: str, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """temperature² · the summed divergence of a chunk, and its gradient with respect to the student's logits.

    Works in place where it can: at this size a fresh tensor costs more than the arithmetic on it.
    """
    log_p = teacher.div_(temperature).log_softmax(-1)
    log_q = student.div_(temperature).log_softmax(-1)
    p = torch.exp(log_p, out=teacher)
    q = torch.exp(log_q, out=student)
    difference = log_q.sub_(log_p)  # log q − log p
    scale = temperature**2 * (0.5 if direction == "mixed" else 1.0)
    total = difference.new_zeros(())
    grad = torch.zeros((), dtype=q.dtype, device=q.device)
    if direction != "reverse":
        total -= scale * _rows_dot(p, difference).sum()
        if want_grad:
            grad = p.neg_().add_(q).mul_(scale / temperature)
    if direction != "forward":
        reverse = _rows_dot(q, difference)
        total += scale * reverse.sum()
        if want_grad:
            grad = grad + difference.sub_(reverse[:, None]).mul_(q).mul_(scale / temperature)
    return total, grad if want_grad else None


def _rows_dot(a: Tensor, b: Tensor) -> Tensor:
    """`[N, V]`, `[N, V]` -> `[N]`, without a product of their size."""
    return (a[:, None, :] @ b[:, :, None])[:, 0, 0]
