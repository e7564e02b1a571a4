"""The distillation losses in plain PyTorch, a chunk of tokens at a time.

The gradient of the logits has a closed form, so each chunk's gradients are taken while its logits exist: no logits are
kept for the backward pass and none are computed twice.
This file imports nothing but torch: exported models carry it.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

CHUNK_TOKENS = 1024
CPU_LOGITS = 1 << 22
"""Logits of a chunk on a CPU: few enough to stay in its caches and in memory that is handed out again at once."""

Divergence = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor, Tensor | None]]
"""Rows, the student's logits of them `[rows, vocabulary]`, and whether a gradient is wanted -> the summed divergence,
on how many of them both put the same token first, and the divergence's gradient by the logits, maybe in their place."""


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
    """Mean KL divergence of two next-token distributions times temperature², and their top-1 agreement.

    Hidden states `[N, d]` or `[B, T, d]`, heads `[vocabulary, d]`, biases `[vocabulary]`, mask bool `[N]` or `[B, T]`.
    forward is KL(teacher ‖ student), reverse KL(student ‖ teacher), mixed the mean of both. Two scalars.
    """
    student_hidden, teacher_hidden = _counted(mask, student_hidden, teacher_hidden)
    dtype = _sum_dtype(student_hidden)

    def divergence(rows: slice, student: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        teacher = _logits(teacher_hidden[rows], teacher_head, teacher_bias, dtype)
        agreement = (student.argmax(-1) == teacher.argmax(-1)).sum()
        with torch.autocast(student.device.type, enabled=False):  # the sums over the vocabulary need their digits
            loss, grad = _divergence(student, teacher, float(temperature), direction, gradient)
        return loss, agreement, grad

    return _chunked(student_hidden, student_head, student_bias, divergence, chunk_tokens)


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
    """Mean KL divergence over the teacher's k tokens and the rest as one, and the top-1 agreement: two scalars.

    Hidden states `[N, d]` or `[B, T, d]`, head `[vocabulary, d]`, bias `[vocabulary]`, ids and natural
    log-probabilities `[N, k]` or `[B, T, k]`, mask bool `[N]` or `[B, T]`.
    """
    student_hidden, top_ids, top_log_probs = _counted(mask, student_hidden, top_ids, top_log_probs)
    dtype = _sum_dtype(student_hidden)

    def divergence(rows: slice, student: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        ids = top_ids[rows].long()
        agreement = (student.argmax(-1) == ids[:, 0]).sum()
        loss, grad = _top_k_divergence(student, ids, top_log_probs[rows].to(dtype), gradient)
        return loss, agreement, grad

    return _chunked(student_hidden, student_head, student_bias, divergence, chunk_tokens)


def _chunked(
    hidden: Tensor, head: Tensor, bias: Tensor | None, divergence: Divergence, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """The mean divergence and agreement of hidden states `[N, d]` through a head `[vocabulary, d]`."""
    chunk_tokens = CHUNK_TOKENS if chunk_tokens is None else chunk_tokens
    if hidden.device.type == "cpu":
        chunk_tokens = min(chunk_tokens, max(1, CPU_LOGITS // max(1, head.shape[0])))
    if not torch.is_grad_enabled():  # which the function below is not told
        hidden, head, bias = hidden.detach(), head.detach(), None if bias is None else bias.detach()
    loss, agreement = _ChunkedLoss.apply(hidden, head, bias, divergence, chunk_tokens)
    return loss, agreement


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, divergence: Divergence, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        dtype = _sum_dtype(hidden)
        tokens = max(1, hidden.shape[0])
        loss, agreement = hidden.new_zeros((), dtype=dtype), hidden.new_zeros((), dtype=dtype)
        want_hidden, want_head, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_head = torch.zeros_like(head, dtype=dtype) if want_head else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if want_bias and bias is not None else None

        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = _logits(hidden[rows], head, bias, dtype)
            summed, agreed, grad = divergence(rows, logits, any(ctx.needs_input_grad))
            loss += summed
            agreement += agreed
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

        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        ctx.dtypes = (hidden.dtype, head.dtype, None if bias is None else bias.dtype)
        agreement /= tokens
        ctx.mark_non_differentiable(agreement)
        return loss / tokens, agreement

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None)


def _counted(mask: Tensor | None, *by_token: Tensor) -> list[Tensor]:
    """Each `[N, ...]`, of the tokens that count."""
    rows = [tensor.flatten(0, -2) for tensor in by_token]
    if mask is None:
        return rows
    index = mask.flatten().nonzero().squeeze(-1)
    return [tensor[index] for tensor in rows]


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


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


def _top_k_divergence(logits: Tensor, ids: Tensor, log_p: Tensor, want_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The summed divergence of a chunk over k + 1 buckets, and its gradient with respect to the logits.

    The tail's logits are summed relative to their own largest, so that neither the logarithm of its mass nor a share of
    it is lost where it weighs almost nothing. Takes the logits' place.
    """
    has_tail = ids.shape[-1] < logits.shape[-1]
    log_mass = log_p.logsumexp(-1, keepdim=True)  # rounded probabilities may sum to a little more than 1
    log_p = log_p - (log_mass.clamp_(min=0) if has_tail else log_mass)
    p = log_p.exp()
    top = logits.gather(-1, ids)
    tail = logits.scatter_(-1, ids, float("-inf"))
    tail_total = tail.logsumexp(-1, keepdim=True)  # −∞ where there is no tail
    total = torch.logaddexp(top.logsumexp(-1, keepdim=True), tail_total)
    log_q = top - total
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum()
    difference = torch.zeros_like(total)
    if has_tail:
        tail_p = (1 - p.sum(-1, keepdim=True)).clamp_(min=0)
        log_tail_q = tail_total - total
        divergence += torch.where(tail_p > 0, tail_p * (tail_p.log() - log_tail_q), 0.0).sum()
        difference = log_tail_q.exp() - tail_p
    if not want_grad:
        return divergence, None
    # The tail's tokens share its mass's gradient q_t − p_t as they share the mass.
    grad = tail.softmax(-1).mul_(difference) if has_tail else tail.zero_()
    return divergence, grad.scatter_(-1, ids, log_q.exp() - p)


def _rows_dot(a: Tensor, b: Tensor) -> Tensor:
    """`[N, V]`, `[N, V]` -> `[N]`, without a product of their size."""
    return (a[:, None, :] @ b[:, :, None])[:, 0, 0]
