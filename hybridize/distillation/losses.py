"""The losses: each compares tensors, knows no model, and returns fp32 scalars."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hybridize.recipe.schema import Loss
from hybridize_kernels import distillation_loss

_SMALLEST_POWER = 1e-12
"""Keeps a teacher output of zeros from dividing by zero."""


@dataclass(frozen=True)
class Head:
    """Last hidden states and what turns them into logits.

    Attributes:
        hidden: [B, T, hidden_size].
        weight: [vocabulary, hidden_size]. bias: [vocabulary] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def detached(self) -> Head:
        """The same numbers without gradient."""
        return Head(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach())


def relative_error(out: Tensor, target: Tensor) -> Tensor:
    """||out - target||² / ||target||² over all elements; 1 for an output of zeros."""
    target = target.float()
    return (out.float() - target).square().sum() / target.square().sum().clamp_min(_SMALLEST_POWER)


def cross_entropy(head: Head, tokens: Tensor, chunk_tokens: int = 1024) -> Tensor:
    """Mean next-token loss over tokens [B, T]; logits exist for `chunk_tokens` positions at a time, in backward too."""
    hidden = head.hidden[:, :-1].flatten(0, 1)
    labels = tokens[:, 1:].flatten()
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(labels), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        total = total + checkpoint(
            _summed_cross_entropy, hidden[part], head.weight, head.bias, labels[part], use_reentrant=False
        )
    return total / max(len(labels), 1)


def _summed_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight.to(hidden.dtype), bias)
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


def distillation_terms(
    settings: Loss, student: Head, teacher: Head, tokens: Tensor, *, measure: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of a stage's losses, and each of them without gradient.

    Args:
        measure: take the divergence and the agreement although the stage does not learn from them.

    Returns:
        the loss without the mixers' own terms, and what was taken: "kl" and "agreement" (where "kl" has a weight or
        `measure` asks for it), "hidden" and "cross_entropy" (where their weight is not zero).
    """
    terms: dict[str, Tensor] = {}
    measured: dict[str, Tensor] = {}
    if settings.kl or measure:
        learner = student if settings.kl else student.detached()  # its gradient costs a product with the vocabulary
        terms["kl"], measured["agreement"] = _divergence(settings, learner, teacher)
    if settings.hidden:
        terms["hidden"] = relative_error(student.hidden, teacher.hidden)
    if settings.cross_entropy:
        terms["cross_entropy"] = cross_entropy(student, tokens)
    weighted = [getattr(settings, name) * term for name, term in terms.items() if getattr(settings, name)]
    return torch.stack(weighted).sum(), {name: term.detach() for name, term in (terms | measured).items()}


def _divergence(settings: Loss, student: Head, teacher: Head) -> tuple[Tensor, Tensor]:
    return distillation_loss(
        student.hidden,
        teacher.hidden,
        student.weight,
        teacher.weight,
        temperature=settings.temperature,
        direction=settings.direction,
        student_bias=student.bias,
        teacher_bias=teacher.bias,
    )
