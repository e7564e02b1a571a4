"""A linear layer with all that a decoding step does around it: norm before, bias, activation and residual sum after."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import norm_linear as _eager
from .reference import norm_linear as _reference

__all__ = ["norm_linear"]

MAX_SIZE = 16384  # of a row that is normalised: with many rows it lies whole in a tile


def norm_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float | None = None,
    residual: Tensor | None = None,
    activation: Literal["swiglu"] | None = None,
    overwrites_residual: bool = False,
) -> Tensor:
    """y = rms_norm(x) Wᵀ + bias, or x Wᵀ + bias without a norm; then the activation, or the sum with the residual.

    For decoding: up to 16 rows are one kernel, which reads the weight once and rounds once, at the end. More rows run
    the kernels of the parts one after the other.

    Args:
        x: `[..., D]`, at least two dimensions.
        weight: `[N, D]`. bias: `[N]` or None.
        norm_weight: `[D]`, and epsilon, which is added to the mean square; both or none.
        residual: `[..., N]` of x's dtype, added to the result.
        activation: "swiglu": weight and bias have N = 2 I rows, the gate's above those of what it gates, and
            y = silu(gate) · up. There is no residual with it.
        overwrites_residual: the result may take the place of the residual, which saves a copy of it; what the residual
            then holds is not said.

    Returns:
        `[..., N]`, with swiglu `[..., I]`, contiguous, in x's dtype. There is no gradient.

    Raises:
        ValueError: a shape does not fit the others, or one of two things that belong together is missing.

    Sources: https://arxiv.org/abs/1910.07467, eq. 4 (RMSNorm); https://arxiv.org/abs/2002.05202, eq. 5 (SwiGLU).
    """
    op = "norm_linear"
    _check(op, x, weight, bias, norm_weight, residual)
    if (norm_weight is None) != (epsilon is None):
        raise ValueError(f"{op}: norm_weight and epsilon are given together or not at all")
    if activation not in (None, "swiglu"):
        raise ValueError(f"{op}: activation is {activation!r}, expected 'swiglu' or None")
    if activation is not None and (residual is not None or weight.shape[0] % 2):
        raise ValueError(f"{op}: swiglu takes two halves of {weight.shape[0]} rows, and no residual")
    options: dict[str, Any] = {
        "bias": bias,
        "norm_weight": norm_weight,
        "epsilon": None if epsilon is None else float(epsilon),
        "residual": residual,
        "activation": activation,
    }
    fits = x.numel() > 0 and weight.numel() > 0 and (norm_weight is None or x.shape[-1] <= MAX_SIZE)
    with torch.no_grad():
        form = choose(op, x, weight, bias, norm_weight, residual, has_kernel=True, kernel_fits=fits)
        if form == "triton":
            from .kernel import norm_linear as kernel  # imports Triton, which need not be there

            return untraced(kernel)(x, weight, overwrites_residual=overwrites_residual, **options)
        run = _reference if form == "reference" else _eager
        return run(x, weight, **options)


def _check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, residual: Tensor | None
) -> None:
    if x.ndim < 2 or weight.ndim != 2:
        raise ValueError(f"{op}: x {list(x.shape)} and weight {list(weight.shape)} must be [..., D] and [N, D]")
    outputs, size = weight.shape
    check_shape(op, "x", x, (*x.shape[:-1], size))
    for name, tensor, expected in (
        ("bias", bias, (outputs,)),
        ("norm_weight", norm_weight, (size,)),
        ("residual", residual, (*x.shape[:-1], outputs)),
    ):
        if tensor is not None:
            check_shape(op, name, tensor, expected)
