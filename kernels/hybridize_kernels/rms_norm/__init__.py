"""RMSNorm over the last dimension, with the sum of the residual stream before it: how a decoder layer's parts begin."""

from typing import Literal, overload

from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import rms_norm as _eager
from .reference import rms_norm as _reference

__all__ = ["rms_norm"]

MAX_SIZE = 16384  # a row lies whole in a tile


@overload
def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, epsilon: float, residual: Tensor, return_sum: bool = False
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, epsilon: float, residual: Tensor | None = None, return_sum: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, epsilon: float, residual: Tensor | None = None, return_sum: bool = False
) -> Tensor | tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, *, epsilon: float, residual: Tensor | None = None, return_sum: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """y = s · rsqrt(mean s² + epsilon) · weight, the mean over the last dimension in fp32, with s = residual + x or x.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4. Eager rounds the normalised s to its dtype
    before the product with the weight, as transformers does, and equals it bit for bit where all have one dtype; the
    kernel rounds once, at the end.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        epsilon: added to the mean square.
        residual: `[..., D]`, the residual stream that x is added to; None for none.
        return_sum: also return s where there is no residual: x itself. Who goes on with it instead of x has its
            gradient added to that of the norm inside of the op.

    Returns:
        y `[..., D]` in x's dtype. With a residual (y, s), both in the dtype of the sum; s is rounded to it before its
        norm is taken. Gradients for x, weight and residual, each in its own dtype.

    Raises:
        ValueError: a shape does not fit the others.
    """
    op = "rms_norm"
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no dimension to take the mean over")
    check_shape(op, "weight", weight, (x.shape[-1],))
    if residual is not None:
        check_shape(op, "residual", residual, tuple(x.shape))
    fits = x.shape[-1] <= MAX_SIZE and x.numel() > 0
    form = choose(op, x, weight, residual, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True)
    if form == "triton":
        from .kernel import rms_norm as kernel  # imports Triton, which need not be there

        return untraced(kernel)(x, weight, epsilon=epsilon, residual=residual, return_sum=return_sum)
    run = _reference if form == "reference" else _eager
    return run(x, weight, epsilon=epsilon, residual=residual, return_sum=return_sum)
