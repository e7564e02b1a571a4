"""The gated MLP of a pre-norm layer from the plain forms of its parts."""

from torch import Tensor

from ..lora_linear.eager import LoraProjection, lora_linear
from ..rms_norm.eager import rms_norm
from ..swiglu.eager import swiglu


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
    """s = residual + x; s + down(silu(gate(rms_norm(s))) · up(rms_norm(s))). x, residual `[..., D]`."""
    normed, s = rms_norm(x, norm_weight, epsilon=epsilon, residual=residual)
    inner = swiglu(*lora_linear(normed, (gate, up)))
    return lora_linear(inner, (down,), residual=s)[0]
