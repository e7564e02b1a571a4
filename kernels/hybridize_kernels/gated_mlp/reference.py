"""The gated MLP of a pre-norm layer, as the equations say."""

from torch import Tensor

from ..lora_linear.eager import LoraProjection
from ..lora_linear.reference import lora_linear
from ..rms_norm.reference import rms_norm
from ..swiglu.reference import swiglu


def gated_mlp(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    gate: LoraProjection,
    up: LoraProjection,
    down: LoraProjection,
    *,
    epsilon: float,
) -> Tensor:
    """See `hybridize_kernels.gated_mlp`."""
    s = residual + x
    normed, _ = rms_norm(x, norm_weight, epsilon=epsilon, residual=residual)
    inner = swiglu(*lora_linear(normed, (gate, up)))
    return s + lora_linear(inner, (down,))[0]
