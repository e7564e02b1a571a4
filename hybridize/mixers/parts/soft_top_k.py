"""The gradient of choosing the best: as if the choice were a soft top-k, in which one token's gain is others' loss.

A budget is full, so a token stays only in the place of another one. A gate for each token by itself does not know of
that: whatever helps a little pushes up, and the scores of all tokens rise together. In a soft top-k

    p_i = sigmoid(x_i - t)        with t such that the p_i of a text add up to the budget

t moves with the scores (implicit differentiation), and the gradient g of the p becomes, with w = p (1 - p),

    dL/dx_i = w_i (g_i - Σ w_j g_j / Σ w_j):

a token is worth what it brings beyond the price of a place, the mean of g over the tokens at the edge of the budget,
where w is large. Tokens that are far above the edge or below learn nothing. (A relaxation of top-k by entropy: Sander
et al. 2023, https://arxiv.org/abs/2302.01425. Here t is the score at the edge itself, as the choice stays hard.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridize.mixers.parts.documents import kth_largest_of_texts, largest_of_texts, sums_of_texts

_TINY = torch.finfo(torch.float32).tiny


def soft_top_k(
    score: Tensor, logit: Tensor, competing: Tensor, *, places: int, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`score`, whose gradient reaches `logit` as that of a soft top-k, and a part of what is minimised.

    The gradient g of each text and head is divided by its root mean square, so that all have the same say. In texts
    with places left, the tokens above zero, they do not compete: t and the price are zero.

    Args:
        score: [B, T, H], what attention gets. logit: [B, T, H], what the score was made of, above zero if positive.
        competing: [B, T, 1 | H] bool, the tokens that compete; others have no gradient.
        places: tokens that stay.
        cu_seqlens: [N + 1], the bounds of documents of one row, each a text; None: a row is one.

    Returns:
        The score, and a scalar that is 0. The gradient that reaches this tells how much the choice counts, since
        dividing has taken that out of g. With 1 the gradient of `logit` is dL/dx over the number of competing tokens,
        as the gradient of a mean is.
    """
    chosen: tuple[Tensor, Tensor] = _SoftTopK.apply(  # type: ignore[no-untyped-call]
        score.detach(), logit, competing.expand_as(logit), places, cu_seqlens
    )
    return chosen


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, score: Tensor, logit: Tensor, competing: Tensor, places: int, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logit, competing, cu_seqlens)
        ctx.places = places
        return score.view_as(score), logit.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor, share: Tensor
    ) -> tuple[None, Tensor, None, None, None]:
        logit, competing, cu_seqlens = ctx.saved_tensors
        g = _of_equal_size(gradient.float().masked_fill(~competing, 0.0), competing, cu_seqlens)
        edge = kth_largest_of_texts(logit.float().masked_fill(~competing, -torch.inf), ctx.places, cu_seqlens)
        p = torch.sigmoid(logit.float() - edge.clamp(min=0.0))
        w = (p * (1 - p)).masked_fill(~competing, 0.0)
        price = sums_of_texts(w * g, cu_seqlens) / sums_of_texts(w, cu_seqlens).clamp(min=_TINY)
        slope = w * (g - price.where(edge > 0, 0.0)) / competing.sum().clamp(min=1)
        return None, (slope * share).to(logit.dtype), None, None, None


def _of_equal_size(g: Tensor, competing: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B, T, H] over its root mean square in each text and head; by the largest first, for the sake of small ones."""
    g = g / largest_of_texts(g.abs(), cu_seqlens).clamp(min=_TINY)
    mean_square = sums_of_texts(g.square(), cu_seqlens) / sums_of_texts(competing, cu_seqlens).clamp(min=1)
    return g / mean_square.sqrt().clamp(min=_TINY)
