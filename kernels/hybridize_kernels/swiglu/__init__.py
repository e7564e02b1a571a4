"""SwiGLU, the gate of a feed-forward block: silu(gate) · up."""

from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import swiglu as _eager
from .reference import swiglu as _reference

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """y = gate · sigmoid(gate) · up, element by element.

    Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 5 without its matrices. Eager rounds silu(gate) to its
    dtype before the product, as transformers does; the kernel computes in fp32 and rounds once.

    Args:
        gate: `[..., I]`; without `up`, `[..., 2 I]`, the gate and then what it gates.
        up: `[..., I]`, or None. Rows of either may lie apart, as in slices of a wider projection.

    Returns:
        `[..., I]`, contiguous, in the wider dtype of the two. Gradients for each in its own dtype and shape.

    Raises:
        ValueError: the shapes do not fit.
    """
    op = "swiglu"
    if gate.ndim == 0:
        raise ValueError(f"{op}: gate has no dimensions")
    if up is not None:
        check_shape(op, "up", up, tuple(gate.shape))
    elif gate.shape[-1] % 2:
        raise ValueError(f"{op}: gate has shape {list(gate.shape)}, expected two halves, or a tensor for each")
    form = choose(op, gate, up, has_kernel=True, kernel_fits=gate.numel() > 0, kernel_has_gradient=True)
    if form == "triton":
        from .kernel import swiglu as kernel  # imports Triton, which need not be there

        return untraced(kernel)(gate, up)
    run = _reference if form == "reference" else _eager
    return run(gate, up)
