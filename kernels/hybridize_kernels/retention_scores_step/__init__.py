"""The end of a decoding step of token eviction: the scores that its tokens complete, of all layers at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from ..token_scorer import KERNEL_DTYPES, MAX_HEAD_SIZE
from .eager import retention_scores_step as _eager
from .reference import retention_scores_step as _reference

__all__ = ["retention_scores_step"]

MAX_CONVOLUTIONS = 4
"""All of a scorer's parameters are arguments of the kernel, as in `token_scorer/step.py`."""


@torch.no_grad()
def retention_scores_step(
    k: Tensor,
    v: Tensor,
    history: Tensor,
    scores: Tensor,
    positions: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    *,
    dilation: int,
    window: int,
    threshold: Tensor | None = None,
    score: str = "sigmoid",
    steps_per_unit: float = 2.0**16,
) -> None:
    """Scores, in every layer, the tokens whose right context this step completes, and writes that into the caches.

    The token at p of a row completes the logit x of position p − m, m = convolutions · dilation · (kernel − 1) / 2,
    which `token_scorer_step` defines. Its score s is that of `retention_decision`,

        s = sigmoid(x − threshold) − 1/2    or    s = max(x − threshold, 0),

    rounded to whole steps, ties to even. If p >= m, scores[layer, row, head, (p − m) mod W] ← s: that position leaves
    the window no sooner than in step p − m + W, so nothing in step p reads its score, and `retained_decode` without a
    `fresh_score`, followed by this op, leaves the cache that it leaves with it, bit for bit.

    Args:
        k, v: `[L, B, H, D]`, keys before RoPE and values of this step's tokens in L layers.
        history: `[L, B, H, width]` float32, as of `token_scorer_step`. scores: `[L, B, H, W + C]` float32, as of
            `retained_decode`. Both contiguous and updated in place.
        positions: `[B]` or `[B, 1]` int32 or int64, the token's position in each row, of all layers; −1: the row
            takes no part, and nothing of it changes.
        weights: one `[L, S, kernel · C, C']` a convolution, tap by tap; the first C is 2 D, kernel is odd; S is 1, or
            H with a scorer for each head. biases: `[L, S, C']` each. output_weight: `[L, S, C, 1]`. output_bias:
            `[L, S, 1]`. L may be expanded: one scorer for all layers.
        dilation: tokens between two taps. window: W, tokens, above m.
        threshold: `[L, H]`, what a logit has to exceed; None: zero.
        score: "sigmoid" or "relu". steps_per_unit: of the grid; a power of two divides without rounding.

    Raises:
        ValueError: a shape does not fit the others, history or scores are not contiguous, m is not between 0 and W, or
            there is no such score.

    Source: arXiv 2510.20787, section 3 (the retention score).
    """
    op = "retention_scores_step"
    _check(op, k, v, history, scores, positions, threshold, window)
    stored = _check_scorer(op, k, weights, biases, output_weight, output_bias, dilation)
    inputs = 2 * k.shape[3] + sum(bias.shape[-1] for bias in biases[:-1])
    check_shape(op, "history", history, (*k.shape[:3], stored * inputs))
    margin = len(biases) * stored // 2
    if not 0 < margin < window:
        raise ValueError(f"{op}: a score needs {margin} later tokens, expected 1 to {window - 1}, below the window")
    if score not in ("sigmoid", "relu"):
        raise ValueError(f"{op}: there is no score {score!r}, expected 'sigmoid' or 'relu'")
    tensors = (k, v, history, scores, *weights, *biases, output_weight, output_bias, threshold)
    form = choose(op, *tensors, has_kernel=True, kernel_fits=_fits(k, v, history, scores, biases))
    options: dict[str, Any] = {
        "dilation": dilation,
        "window": window,
        "threshold": threshold,
        "score": score,
        "steps_per_unit": float(steps_per_unit),
    }
    if form == "triton":
        from .kernel import retention_scores_step as kernel  # imports Triton, which need not be there

        run = untraced(kernel)
    else:
        run = _reference if form == "reference" else _eager
    run(k, v, history, scores, positions, weights, biases, output_weight, output_bias, **options)


def _fits(k: Tensor, v: Tensor, history: Tensor, scores: Tensor, biases: Sequence[Tensor]) -> bool:
    """Whether the kernel covers these sizes and types."""
    sizes = (k.shape[3], *(bias.shape[-1] for bias in biases))
    known = k.dtype == v.dtype and k.dtype in KERNEL_DTYPES and history.dtype == scores.dtype == torch.float32
    return known and len(biases) <= MAX_CONVOLUTIONS and min(sizes) > 0 and max(sizes) <= MAX_HEAD_SIZE


def _check(
    op: str,
    k: Tensor,
    v: Tensor,
    history: Tensor,
    scores: Tensor,
    positions: Tensor,
    threshold: Tensor | None,
    window: int,
) -> None:
    if k.ndim != 4:
        raise ValueError(f"{op}: k has shape {list(k.shape)}, expected [layers, batch, heads, head size]")
    layers, batch, heads, _ = k.shape
    check_shape(op, "v", v, tuple(k.shape))
    if scores.ndim != 4 or scores.shape[3] < window:
        raise ValueError(f"{op}: scores has shape {list(scores.shape)}, expected {window} slots of a window at least")
    check_shape(op, "scores", scores, (layers, batch, heads, scores.shape[3]))
    check_shape(op, "positions", positions, (batch, 1) if positions.ndim == 2 else (batch,))
    if threshold is not None:
        check_shape(op, "threshold", threshold, (layers, heads))
    for name, tensor in (("history", history), ("scores", scores)):
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} is updated in place and must be contiguous")


def _check_scorer(
    op: str,
    k: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    dilation: int,
) -> int:
    """How many inputs of a convolution the history holds."""
    if not weights or len(weights) != len(biases):
        raise ValueError(f"{op}: {len(weights)} weights and {len(biases)} biases, expected one of each a convolution")
    if weights[0].ndim != 4:
        raise ValueError(
            f"{op}: weight 0 has shape {list(weights[0].shape)}, expected [layers, scorers, inputs, outputs]"
        )
    (layers, _, heads, head_size), (scorers, rows) = k.shape, weights[0].shape[1:3]
    if scorers not in (1, heads):
        raise ValueError(f"{op}: weights for {scorers} scorers, expected 1 or one for each of the {heads} heads")
    channels = 2 * head_size
    kernel = rows // max(channels, 1)
    if kernel % 2 == 0:
        raise ValueError(f"{op}: weight 0 has {rows} rows, expected an odd kernel times {channels}")
    for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_shape(op, f"weight {n}", weight, (layers, scorers, kernel * channels, bias.shape[-1]))
        check_shape(op, f"bias {n}", bias, (layers, scorers, bias.shape[-1]))
        channels = bias.shape[-1]
    check_shape(op, "output_weight", output_weight, (layers, scorers, channels, 1))
    check_shape(op, "output_bias", output_bias, (layers, scorers, 1))
    return (kernel - 1) * dilation
