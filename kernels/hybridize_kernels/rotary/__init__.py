"""Rotary position embedding of queries and keys, in the layout of transformers."""

from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import rotary as _eager
from .reference import rotary as _reference

__all__ = ["rotary"]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x · cos + rotate_half(x) · sin over the first R numbers of every head, rotate_half((x₁, x₂)) = (−x₂, x₁).

    Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34, with a pair's two numbers R/2 apart, as transformers
    has them. What follows the first R numbers passes through. The two halves of cos and sin may differ. Eager rounds
    every product where all are of one half-precision dtype, as transformers does; the kernel rounds once.

    Args:
        q: `[B, T, HQ, D]`.
        k: `[B, T, H, D]`. Tokens of either may lie apart, as in slices of one projection.
        cos: `[B or 1, T, R]`, R even and at most D.
        sin: as cos; neither gets a gradient.

    Returns:
        Queries and keys rotated, new and contiguous, each in its own dtype.

    Raises:
        ValueError: a shape does not fit the others.
    """
    op = "rotary"
    if q.ndim != 4:
        raise ValueError(f"{op}: q has shape {list(q.shape)}, expected [batch, time, heads, head size]")
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"{op}: k has shape {list(k.shape)}, expected that of q, {list(q.shape)}, but for the heads")
    size = cos.shape[-1] if cos.ndim == 3 else 0
    if size % 2 or not 0 < size <= q.shape[3] or cos.shape[1] != q.shape[1] or cos.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"{op}: cos has shape {list(cos.shape)}, expected [{q.shape[0]} or 1, {q.shape[1]}, even and at most "
            f"{q.shape[3]}]"
        )
    check_shape(op, "sin", sin, tuple(cos.shape))
    if cos.requires_grad or sin.requires_grad:
        cos, sin = cos.detach(), sin.detach()
    fits = q.numel() > 0 and k.numel() > 0
    form = choose(op, q, k, cos, sin, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True)
    if form == "triton":
        from .kernel import rotary as kernel  # imports Triton, which need not be there

        return untraced(kernel)(q, k, cos, sin)
    run = _reference if form == "reference" else _eager
    return run(q, k, cos, sin)
