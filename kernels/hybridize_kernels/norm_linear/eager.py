"""A norm and the linear layer that reads it, from the plain forms of their parts: transformers' order of roundings.

This file imports nothing but torch and its neighbours' plain forms.
"""

from torch import Tensor

from ..lora_linear.eager import LoraProjection, product
from ..rms_norm.eager import rms_norm
from ..swiglu.eager import swiglu


def norm_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """rms_norm(x) Wᵀ + bias, its activation, its sum with the residual. x `[..., D]`, weight `[N, D]`."""
    if norm_weight is not None and epsilon is not None:
        normed = rms_norm(x, norm_weight, epsilon=epsilon)
        assert isinstance(normed, Tensor)  # of two results there is a pair
        x = normed
    y = product(x, LoraProjection(weight, bias), weight.to(x.dtype), residual)
    return swiglu(y) if activation == "swiglu" else y
