"""RMSNorm over the head with a scale for each head and a sigmoid gate: how a recurrent mixer ends."""

from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import gated_rms_norm as _eager
from .reference import gated_rms_norm as _reference

__all__ = ["gated_rms_norm"]

MAX_HEAD_SIZE = 256  # a head lies whole in a tile


def gated_rms_norm(x: Tensor, scale: Tensor, gate: Tensor | None = None, *, epsilon: float | None = 1e-6) -> Tensor:
    """y = x · rsqrt(mean x² + epsilon) · scale · 2 sigmoid(gate), the mean over the head, all of it in fp32.

    Twice the sigmoid, so that a gate that starts at 0 lets everything through.

    Args:
        x: `[B, T, H, D]`.
        scale: `[H, D]`.
        gate: `[B, T, H, D]`; None for none.
        epsilon: None leaves the norm out.

    Returns:
        `[B, T, H, D]` in x's dtype. Gradients for x, scale and gate, each in its own dtype.

    Raises:
        ValueError: a shape does not fit the others.
    """
    op = "gated_rms_norm"
    if x.ndim != 4:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [batch, time, heads, head size]")
    check_shape(op, "scale", scale, tuple(x.shape[2:]))
    if gate is not None:
        check_shape(op, "gate", gate, tuple(x.shape))
    fits = x.shape[-1] <= MAX_HEAD_SIZE and x.numel() > 0
    form = choose(op, x, scale, gate, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True)
    if form == "triton":
        from .kernel import gated_rms_norm as kernel  # imports Triton, which need not be there

        return untraced(kernel)(x, scale, gate, epsilon=epsilon)
    run = _reference if form == "reference" else _eager
    return run(x, scale, gate, epsilon=epsilon)
