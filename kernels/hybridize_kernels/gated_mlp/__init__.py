"""The second half of a decoder layer in one op: residual sum, norm, gated MLP with adapters, residual sum."""

from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from ..lora_linear import LoraProjection
from .eager import gated_mlp as _eager
from .reference import gated_mlp as _reference

__all__ = ["gated_mlp"]

MAX_SIZE = 16384  # of the hidden states, a row of which lies whole in a tile of the norm


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
    """s = residual + x, n = rms_norm(s); s + down(silu(gate(n)) · up(n)).

    The kernel's form keeps s, gate(n) and up(n) for the backward pass; the norm and the activation are made again.

    Args:
        x, residual: `[..., D]`.
        norm_weight: `[D]`. epsilon: added to the mean square.
        gate, up: D -> I, see `LoraProjection`. down: I -> D.

    Returns:
        `[..., D]`. Gradients for x, residual, the norm's weight and whatever of the projections asks for one.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6 (SwiGLU), in a pre-norm layer.
    """
    op = "gated_mlp"
    width, inner = x.shape[-1], gate.weight.shape[0]
    check_shape(op, "residual", residual, tuple(x.shape))
    check_shape(op, "norm_weight", norm_weight, (width,))
    check_shape(op, "gate's weight", gate.weight, (inner, width))
    check_shape(op, "up's weight", up.weight, (inner, width))
    check_shape(op, "down's weight", down.weight, (width, inner))
    fits = 0 < width <= MAX_SIZE and x.numel() > 0 and x.dtype == residual.dtype and down.bias is None
    tensors = (x, residual, norm_weight, gate.weight, up.weight, down.weight)
    form = choose(op, *tensors, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True)
    if form == "triton":
        from .kernel import gated_mlp as kernel  # imports Triton, which need not be there

        return untraced(kernel)(x, residual, norm_weight, gate, up, down, epsilon=epsilon)
    run = _reference if form == "reference" else _eager
    return run(x, residual, norm_weight, gate, up, down, epsilon=epsilon)
