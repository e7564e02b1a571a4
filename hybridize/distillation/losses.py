"""The losses: each compares tensors, knows no model, and returns fp32 scalars.

They are means over sequences of equal length, so that it does not matter how those of a step are cut into micro-batches
and shared out to processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hybridize.distillation.top_k import TopK
from hybridize.errors import RecipeError
from hybridize.recipe.schema import Loss
from hybridize_kernels import distillation_loss
from hybridize_kernels.distillation_loss import top_k_distillation_loss

NO_LABEL = -100
"""The label of a token after which the text does not go on."""
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


Target = Head | TopK
"""What a student is compared with: the whole distribution, or its head."""


def relative_error(out: Tensor, target: Tensor, sequences: int = 1) -> Tensor:
    """||out - target||² / ||target||² over all elements of a sequence, the mean of all; 1 for an output of zeros.

    sequences: how many equally long ones lie end to end in the leading dimensions.
    """
    target = target.float().reshape(sequences, -1)
    errors = (out.float().reshape(sequences, -1) - target).square().sum(1)
    return (errors / target.square().sum(1).clamp_min(_SMALLEST_POWER)).mean()


def next_tokens(tokens: Tensor, continues: Tensor | None = None) -> Tensor:
    """The labels of tokens [B, T]: the next token of the row, but where `continues` [B, T] is False."""
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = NO_LABEL
    return labels if continues is None else labels.masked_fill(~continues, NO_LABEL)


def cross_entropy(head: Head, labels: Tensor, chunk_tokens: int = 1024) -> Tensor:
    """Next-token loss, the mean of those of the rows; logits exist for `chunk_tokens` positions at once, backward too.

    Args:
        labels: [B, T], the next token of each; negative where there is none.
    """
    known = (labels >= 0).float()
    weights = (known / known.sum(1, keepdim=True).clamp(min=1) / len(labels)).flatten()
    hidden, labels = head.hidden.flatten(0, -2), labels.flatten()
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(labels), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        total = total + checkpoint(
            _weighted_cross_entropy,
            hidden[part],
            head.weight,
            head.bias,
            labels[part],
            weights[part],
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn
        )
    return total


def _weighted_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor
) -> Tensor:
    logits = functional.linear(hidden, weight.to(hidden.dtype), bias)
    losses = functional.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="none")
    return losses @ weights


def distillation_terms(
    settings: Loss,
    student: Head,
    target: Target,
    labels: Tensor | None,
    *,
    measure: bool = True,
    sequences: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of a stage's losses, and each of them without gradient.

    Args:
        labels: as of `cross_entropy`; None unless that has a weight.
        measure: take the divergence and the agreement although the stage does not learn from them.
        sequences: how many equally long ones the hidden states are of.

    Returns:
        the loss without the mixers' own terms, and what was taken: "kl" and "agreement" (where "kl" has a weight or
        `measure` asks for it), "hidden" and "cross_entropy" (where their weight is not zero).

    Raises:
        RecipeError: the last hidden states are to be compared, and the target has none.
    """
    terms: dict[str, Tensor] = {}
    measured: dict[str, Tensor] = {}
    if settings.kl or measure:
        learner = student if settings.kl else student.detached()  # its gradient costs a product with the vocabulary
        terms["kl"], measured["agreement"] = _divergence(settings, learner, target)
    if settings.hidden:
        if not isinstance(target, Head):
            raise RecipeError("A teacher cache holds no last hidden states.", where="loss.hidden", hint="Set it to 0.")
        terms["hidden"] = relative_error(student.hidden, target.hidden, sequences)
    if settings.cross_entropy and labels is not None:
        terms["cross_entropy"] = cross_entropy(student, labels)
    weighted = [getattr(settings, name) * term for name, term in terms.items() if getattr(settings, name)]
    return torch.stack(weighted).sum(), {name: term.detach() for name, term in (terms | measured).items()}


def _divergence(settings: Loss, student: Head, target: Target) -> tuple[Tensor, Tensor]:
    if isinstance(target, TopK):
        if settings.direction != "forward" or settings.temperature != 1.0:
            what = "A teacher cache is for the forward divergence at temperature 1."
            raise RecipeError(what, where="loss", hint="Change the loss, or train without teacher_cache.")
        return top_k_distillation_loss(
            student.hidden, student.weight, target.ids, target.log_probs, student_bias=student.bias
        )
    return distillation_loss(
        student.hidden,
        target.hidden,
        student.weight,
        target.weight,
        temperature=settings.temperature,
        direction=settings.direction,
        student_bias=student.bias,
        teacher_bias=target.bias,
    )
