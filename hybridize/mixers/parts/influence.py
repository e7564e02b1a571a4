"""Scores that learn from the loss by regression: what a token's presence changes in it, instead of a step along it.

The gradient of a gate adds up what all later queries say of a token. What stands everywhere, a full stop or a line that
comes again and again, is used a little by all of them, and adds up to more than a number that a single query looks for.
So the largest influence counts here, that of the one query which needs the token most, on a logarithmic scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Regression = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, T, H], logarithm of their influence, -inf where there is none) -> a scalar loss."""


def regressed_on_influence(score: Tensor, logit: Tensor, loss: Regression) -> tuple[Tensor, Tensor]:
    """`score`, whose gradient is taken for an influence on which `logit` is regressed, and a part of what is minimised.

    Args:
        score: [B, T, H], what attention gets; it must give the influence of each token as its gradient (see
            `retained_attention`, score_gradient "influence").
        logit: [B, T, H], what the score was made of; the gradient of `loss` is its only one.
        loss: of logits and the logarithm of influences; called in the backward pass.

    Returns:
        The score, and a scalar that is 0. The gradient that reaches this tells how much the regression counts: the
        influence cannot, a logarithm that is standardised knows of no factor. Without it nothing is learnt.
    """
    regressed: tuple[Tensor, Tensor] = _Regressed.apply(score.detach(), logit, loss)  # type: ignore[no-untyped-call]
    return regressed


class _Regressed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, score: Tensor, logit: Tensor, loss: Regression
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logit)
        ctx.loss = loss
        return score.view_as(score), logit.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, influence: Tensor, share: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (logit,) = ctx.saved_tensors
        with torch.enable_grad():
            free = logit.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(ctx.loss(free, influence.float().log()), free)
        return None, gradient * share.to(gradient.dtype), None
