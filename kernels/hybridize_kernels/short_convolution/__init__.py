"""Short causal convolution over time, a filter a channel: the tokens before a token mixed into it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import short_convolution as _eager
from .eager import short_convolution_step as _eager_step
from .eager import short_convolutions as _eager_of_several
from .reference import short_convolution as _reference
from .reference import short_convolution_step as _reference_step
from .reference import short_convolutions as _reference_of_several

__all__ = ["short_convolution", "short_convolution_step", "short_convolutions"]

ACTIVATIONS = (None, "silu")
MIN_TAPS, MAX_TAPS = 2, 16
MAX_STEP_TOKENS = 16  # one program walks over all tokens of a step
MAX_PARTS = 3  # q, k and v: the pointers of a launch have fixed places


def short_convolution(
    x: Tensor,
    taps: Tensor,
    *,
    tail: Tensor | None = None,
    real: Tensor | None = None,
    activation: str | None = None,
    output_tail: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = f(Σ_s taps[:, n − 1 − s] · x_(t − s)), s = 0 .. n − 1, each channel by itself; sums are in fp32.

    Padding is stepped over: x_(t − 1) is the real token before, however much padding lies between.

    Args:
        x: `[B, T, H, D]`, H · D channels.
        taps: `[H · D, n]`, the newest token's last; n is 2 to 16.
        tail: `[B, n − 1, H · D]`, the real tokens before the text, oldest first; zeros unless given.
        real: `[B, T]` bool, False for padding; None where there is none, which is faster.
        activation: f, "silu" or None for none.
        output_tail: also return the tail after the text, for the text that follows.
        cu_seqlens: `[N + 1]` int32 with B = 1: the bounds, from 0 to T, of documents packed side by side, which do not
            see each other: a tap that would reach into another one reads 0. Such a text has no padding and no tails.
            Kernels never read it on the host; it is taken for changed when torch counts a change of it.

    Returns:
        The output `[B, T, H, D]`, 0 at padding, and, if asked for, the last n − 1 real tokens `[B, n − 1, H · D]`; both
        in x's dtype. Gradients for x, taps and tail.

    Raises:
        ValueError: a shape does not fit the others, there are too few or too many taps, the activation is unknown, or
            cu_seqlens comes with padding, with a tail or with more than one row.
    """
    op = "short_convolution"
    _check(op, x, taps, real, activation)
    batch, _, heads, head_size = x.shape
    if tail is not None:
        check_shape(op, "tail", tail, (batch, taps.shape[1] - 1, heads * head_size))
    if cu_seqlens is not None and (tail is not None or output_tail):
        raise ValueError(f"{op}: cu_seqlens needs one row ({batch} given), without padding and without tails")
    _check_documents(op, x, real, cu_seqlens)
    form = choose(op, x, taps, tail, has_kernel=True, kernel_fits=x.numel() > 0, kernel_has_gradient=True)
    if form == "triton":
        from .convolution import short_convolution as kernel  # imports Triton, which need not be there

        run = untraced(kernel)
    else:
        run = _reference if form == "reference" else _eager
    return run(x, taps, tail=tail, real=real, activation=activation, output_tail=output_tail, cu_seqlens=cu_seqlens)


def short_convolutions(
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    *,
    real: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`short_convolution` of several texts with the same tokens, as a mixer's q, k and v are, in one launch.

    Args:
        xs: `[B, T, H_i, D_i]` each.
        taps: `[H_i · D_i, n]` each.
        real, activation, cu_seqlens: as of `short_convolution`.

    Returns:
        What `short_convolution` returns for each without tails. Gradients for xs and taps.

    Raises:
        ValueError: as `short_convolution`, and where the texts differ in their tokens or the filters in their taps.
    """
    op = "short_convolutions"
    _check_several(op, xs, taps, real, activation)
    _check_documents(op, xs[0], real, cu_seqlens)
    fits = len(xs) <= MAX_PARTS and all(x.numel() > 0 and x.dtype == xs[0].dtype for x in xs)
    form = choose(op, *xs, *taps, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True)
    if form == "triton":
        from .convolution import short_convolutions as kernel

        run = untraced(kernel)
    else:
        run = _reference_of_several if form == "reference" else _eager_of_several
    return run(xs, taps, real=real, activation=activation, cu_seqlens=cu_seqlens)


def short_convolution_step(
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    tail: Tensor,
    real: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """A few further tokens of several texts that keep their tails side by side, as a mixer's q, k and v do.

    Args:
        xs: `[B, T, H_i, D]` each; parts of one projection are read where they lie.
        taps: `[H_i · D, n]` each.
        tail: `[B, n − 1, Σ H_i · D]`, contiguous, in the order of xs; updated in place.
        real, activation: as of `short_convolution`.

    Returns:
        What `short_convolution` returns for each, `[B, T, H_i, D]` in its dtype. There is no gradient.

    Raises:
        ValueError: a shape does not fit the others, or the tail is not contiguous.
    """
    op = "short_convolution_step"
    _check_several(op, xs, taps, real, activation)
    for x in xs:
        check_shape(op, "x", x, (*x.shape[:3], xs[0].shape[3]))
    check_shape(op, "tail", tail, (xs[0].shape[0], taps[0].shape[1] - 1, sum(weight.shape[0] for weight in taps)))
    if not tail.is_contiguous():
        raise ValueError(f"{op}: tail is updated in place and must be contiguous")
    with torch.no_grad():
        fits = xs[0].shape[1] <= MAX_STEP_TOKENS and len(xs) <= MAX_PARTS and all(x.numel() > 0 for x in xs)
        form = choose(op, *xs, *taps, tail, has_kernel=True, kernel_fits=fits)
        if form == "triton":
            from .step import short_convolution_step as kernel

            run = untraced(kernel)
        else:
            run = _reference_step if form == "reference" else _eager_step
        return run(xs, taps, tail, real, activation=activation)


def _check(op: str, x: Tensor, taps: Tensor, real: Tensor | None, activation: str | None) -> None:
    if x.ndim != 4:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [batch, time, heads, head size]")
    batch, time, heads, head_size = x.shape
    if taps.ndim != 2 or not MIN_TAPS <= taps.shape[1] <= MAX_TAPS:
        raise ValueError(
            f"{op}: taps have shape {list(taps.shape)}, expected [{heads * head_size}, {MIN_TAPS} to {MAX_TAPS}]"
        )
    check_shape(op, "taps", taps, (heads * head_size, taps.shape[1]))
    if real is not None:
        check_shape(op, "real", real, (batch, time))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, expected one of {ACTIVATIONS}")


def _check_several(
    op: str, xs: Sequence[Tensor], taps: Sequence[Tensor], real: Tensor | None, activation: str | None
) -> None:
    if not xs or len(xs) != len(taps):
        raise ValueError(f"{op}: {len(xs)} texts and {len(taps)} filters, expected one of each")
    for x, weight in zip(xs, taps, strict=True):
        _check(op, x, weight, real, activation)
        check_shape(op, "x", x, (*xs[0].shape[:2], *x.shape[2:]))
        check_shape(op, "taps", weight, (weight.shape[0], taps[0].shape[1]))


def _check_documents(op: str, x: Tensor, real: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if x.shape[0] != 1 or real is not None:
        raise ValueError(f"{op}: cu_seqlens needs one row ({x.shape[0]} given), without padding and without tails")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}, expected the bounds of a document at least"
        )
