"""The decision on each token: its score on a grid, the L1 loss that pulls the kept tokens to a budget, their count."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import RetentionDecision
from .eager import retention_decision as _eager
from .reference import retention_decision as _reference

__all__ = ["RetentionDecision", "retention_decision"]

SCORES = ("sigmoid", "relu")
MAX_HEADS = 1024  # all heads of a token lie in a tile


def retention_decision(
    logit: Tensor,
    l1_weight: Tensor,
    *,
    score: Literal["sigmoid", "relu"],
    steps_per_unit: float,
    margin: int,
    l1_margin: float = 0.0,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longer_than: int = 0,
) -> RetentionDecision:
    """What a text's logits decide: r_j = sigmoid(x_j) − 1/2, or max(x_j, 0); token j is kept where r_j > 0.

    The last `margin` tokens of a text are not decided: the logits lack their right context. With n the decided tokens
    of all texts (1 if there are none), the loss is the mean over heads of l1_weight · Σ_j max(r_j + l1_margin, 0) / n,
    the sum over decided tokens.

    Args:
        logit: `[B, T, H]`.
        l1_weight: `[H or 1]`, without gradient.
        score: how r is made of x.
        steps_per_unit: r is rounded to multiples of 1 / steps_per_unit, a power of two, ties to even; the gradient
            passes straight through.
        margin: tokens. l1_margin: how far below the threshold the loss reaches; the paper's is 0.
        positions: `[B, T]`, of each token among the real ones of its row, −1 for padding; None: there is no padding.
        cu_seqlens: `[N + 1]` int32 with B = 1: the bounds, from 0 to T, of documents packed side by side, each a text,
            without padding. Kernels never read it on the host; it is taken for changed when torch counts a change.
        longer_than: tokens. Of packed documents those that are longer count for `kept_share`; all, where none is.

    Returns:
        See `RetentionDecision`; decided scores and loss in fp32 (fp64 for fp64 logits), with a gradient for the logits
        from both. Sums are taken in a fixed order: the same bits every time.

    Raises:
        ValueError: a shape does not fit the others, the score is unknown, steps_per_unit is no power of two, or
            cu_seqlens comes with padding or with more than one row.

    Source: arXiv 2510.20787, section 3, for the score and the L1 loss.
    """
    op = "retention_decision"
    if logit.ndim != 3:
        raise ValueError(f"{op}: logit has shape {list(logit.shape)}, expected [batch, time, heads]")
    batch, time, heads = logit.shape
    if l1_weight.shape not in ((1,), (heads,)):
        raise ValueError(f"{op}: l1_weight has shape {list(l1_weight.shape)}, expected [1] or [{heads}]")
    if score not in SCORES:
        raise ValueError(f"{op}: score is {score!r}, expected one of {SCORES}")
    if steps_per_unit <= 0 or math.frexp(steps_per_unit)[0] != 0.5:
        raise ValueError(f"{op}: steps_per_unit is {steps_per_unit}, expected a power of two")
    if positions is not None:
        check_shape(op, "positions", positions, (batch, time))
    if cu_seqlens is not None:
        if batch != 1 or positions is not None:
            raise ValueError(f"{op}: cu_seqlens needs one row ({batch} given), without padding")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}, expected the bounds of a document at least"
            )
    fits = logit.numel() > 0 and heads <= MAX_HEADS and l1_weight.dtype == torch.float32
    form = choose(op, logit, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True)
    if form == "triton":
        from .kernel import retention_decision as kernel  # imports Triton, which need not be there

        run = untraced(kernel)
    else:
        run = _reference if form == "reference" else _eager
    return run(
        logit,
        l1_weight,
        score=score,
        steps_per_unit=steps_per_unit,
        margin=margin,
        l1_margin=l1_margin,
        positions=positions,
        cu_seqlens=cu_seqlens,
        longer_than=longer_than,
    )
