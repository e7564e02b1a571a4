"""Token scorer: a small CNN over keys and values that says how much a token is worth keeping (arXiv 2510.20787)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import token_scorer as _eager
from .eager import token_scorer_step as _eager_step
from .reference import token_scorer as _reference
from .reference import token_scorer_step as _reference_step

# A tile of a kernel holds all output channels of a convolution.
MAX_HEAD_SIZE = 256
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["token_scorer", "token_scorer_step"]


def token_scorer(
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    real: Tensor | None,
    *,
    dilation: int,
    dropout: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """One logit a token and head: x_0 = (k, v), x_l = SiLU(conv_l(dropout(x_{l−1}))), logit = w · x_L + b.

    A convolution reads kernel taps, `dilation` tokens apart and centred, zero outside the text; a padded row equals
    one whose text starts at the edge.

    Args:
        k, v: `[B, T, H, D]`, keys before RoPE and values.
        weights: one `[H or 1, kernel · C, C']` a convolution, tap by tap; the first C is 2 D, kernel is odd.
        biases: `[H or 1, C']` each. output_weight: `[H or 1, C, 1]`. output_bias: `[H or 1, 1]`.
        real: `[B, T]` bool, False for padding, which must not lie between real tokens; None where there is none.
        dilation: tokens between two taps.
        dropout: share of each convolution's inputs that is zeroed.
        compute_dtype: of the factors of the convolutions' products; sums and the projection are fp32 whatever it is.
            fp32 unless given.
        cu_seqlens: `[N + 1]` int32 with B = 1: the bounds, from 0 to T, of documents packed side by side; each scores
            as it does alone. Such a text has no padding. Kernels never read it on the host; it is taken for changed
            when torch counts a change of it.

    Returns:
        `[B, T, H]` in fp32 (fp64 for fp64 keys), whatever the type of k and v.

    Raises:
        ValueError: a shape does not fit the others, dropout is not in [0, 1), or cu_seqlens comes with padding or with
            more than one row.

    Source: arXiv 2510.20787, section 3 (the retention score's CNN).
    """
    op = "token_scorer"
    _check(op, k, v, weights, biases, output_weight, output_bias)
    if real is not None:
        check_shape(op, "real", real, tuple(k.shape[:2]))
    _check_documents(op, k, real, cu_seqlens)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout is {dropout}, expected at least 0 and below 1")
    form = choose(
        op,
        *(k, v, *weights, *biases, output_weight, output_bias),
        has_kernel=True,
        kernel_fits=_fits(k, v, weights, compute_dtype),
        kernel_has_gradient=True,
    )
    if form == "triton":
        from .fused import token_scorer as kernel

        run = untraced(kernel)
    else:
        run = _reference if form == "reference" else _eager
    return run(
        k,
        v,
        weights,
        biases,
        output_weight,
        output_bias,
        real,
        dilation=dilation,
        dropout=dropout,
        compute_dtype=compute_dtype,
        cu_seqlens=cu_seqlens,
    )


def token_scorer_step(
    k: Tensor,
    v: Tensor,
    history: Tensor,
    num_new: Tensor,
    num_before: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    *,
    dilation: int,
) -> Tensor:
    """The logits that further tokens complete, as `token_scorer` gives them for the whole text.

    A logit depends on `margin` = L · dilation · (kernel − 1) / 2 later tokens. Every convolution waits for its right
    taps, so that the stack is a causal CNN whose column t speaks of the token `margin` before it.

    Args:
        k, v: `[B, T, H, D]`; the first num_new columns of a row are its tokens, the others are ignored.
        history: `[B, H, width]` fp32, written in place: for each convolution its last P = (kernel − 1) · dilation
            inputs `[P, C_l]`, that of token n in slot n mod P; width = P Σ C_l. Zero before the first token.
        num_new: `[B]` integers, 0 .. T. num_before: `[B]` integers, tokens seen before this call.
        weights, biases, output_weight, output_bias, dilation: as of `token_scorer`.

    Returns:
        `[B, T, H]` fp32; column t < num_new is the logit of token num_before + t − margin of the text, and means
        nothing where that is negative. No gradient.

    Raises:
        ValueError: a shape does not fit the others.
    """
    op = "token_scorer_step"
    _check(op, k, v, weights, biases, output_weight, output_bias)
    batch, _, heads, head_size = k.shape
    stored = dilation * (weights[0].shape[1] // (2 * head_size) - 1)
    inputs = 2 * head_size + sum(bias.shape[-1] for bias in biases[:-1])
    check_shape(op, "history", history, (batch, heads, stored * inputs))
    check_shape(op, "num_new", num_new, (batch,))
    check_shape(op, "num_before", num_before, (batch,))
    with torch.no_grad():
        fits = stored > 0 and history.is_contiguous() and _fits(k, v, weights, history.dtype)
        form = choose(op, k, v, history, *weights, *biases, output_weight, has_kernel=True, kernel_fits=fits)
        if form == "triton":
            from .streaming import token_scorer_step as kernel

            run = untraced(kernel)
        else:
            run = _reference_step if form == "reference" else _eager_step
        return run(
            k,
            v,
            history,
            num_new,
            num_before,
            weights,
            biases,
            output_weight,
            output_bias,
            dilation=dilation,
        )


def _fits(k: Tensor, v: Tensor, weights: Sequence[Tensor], compute_dtype: torch.dtype | None) -> bool:
    """Whether the kernels cover these sizes and types."""
    widest = max(weight.shape[-1] for weight in weights)
    known = k.dtype == v.dtype and k.dtype in KERNEL_DTYPES and compute_dtype in (None, *KERNEL_DTYPES)
    return known and 0 < k.shape[-1] <= MAX_HEAD_SIZE and widest <= MAX_HEAD_SIZE and k.numel() > 0


def _check_documents(op: str, k: Tensor, real: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if k.shape[0] != 1 or real is not None:
        raise ValueError(f"{op}: cu_seqlens needs one row ({k.shape[0]} given), without padding")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}, expected the bounds of a document at least"
        )


def _check(
    op: str,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
) -> None:
    if k.ndim != 4:
        raise ValueError(f"{op}: k has shape {list(k.shape)}, expected [batch, time, heads, head size]")
    check_shape(op, "v", v, tuple(k.shape))
    if not weights or len(weights) != len(biases):
        raise ValueError(f"{op}: {len(weights)} weights and {len(biases)} biases, expected one of each a convolution")
    heads, channels = k.shape[2], 2 * k.shape[3]
    scorers = weights[0].shape[0]
    if scorers not in (1, heads):
        raise ValueError(f"{op}: weights for {scorers} scorers, expected 1 or one for each of the {heads} heads")
    kernel = weights[0].shape[1] // channels
    if kernel % 2 == 0:
        raise ValueError(f"{op}: weight 0 has {weights[0].shape[1]} rows, expected an odd kernel times {channels}")
    for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_shape(op, f"weight {n}", weight, (scorers, kernel * channels, bias.shape[-1]))
        check_shape(op, f"bias {n}", bias, (scorers, bias.shape[-1]))
        channels = bias.shape[-1]
    check_shape(op, "output_weight", output_weight, (scorers, channels, 1))
    check_shape(op, "output_bias", output_bias, (scorers, 1))
