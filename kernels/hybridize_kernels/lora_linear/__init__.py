"""Linear layers with low-rank adapters that read one input, in as many products as they have weights."""

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import LoraProjection
from .eager import lora_linear as _eager
from .reference import lora_linear as _reference

__all__ = ["LoraProjection", "lora_linear"]


def lora_linear(
    x: Tensor, projections: Sequence[LoraProjection], *, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """y_i = x (W_i + s_i · up_i down_i)ᵀ + b_i, for projections that share their input, as q, k and v do.

    But on a CPU the adapted weight W + s · up down is made in x's dtype first: an adapter costs no product with the
    tokens in the forward pass, and what is computed is what a merged export computes.

    Args:
        x: `[..., in]`.
        projections: see `LoraProjection`; an adapter, a bias or both may be missing.
        residual: `[..., out]` of x's dtype, added to the result; of a single projection only.

    Returns:
        One `[..., out_i]` a projection, in x's dtype. Gradients for x, the residual and whatever of the projections
        asks for one, in its own dtype.

    Raises:
        ValueError: a shape does not fit the others, or there is a residual for several projections.

    Source: Hu et al., https://arxiv.org/abs/2106.09685, eq. 3.
    """
    op = "lora_linear"
    width = x.shape[-1]
    if residual is not None and len(projections) != 1:
        raise ValueError(f"{op}: a residual for {len(projections)} projections, expected one")
    for number, projection in enumerate(projections):
        out = projection.weight.shape[0]
        check_shape(op, f"weight {number}", projection.weight, (out, width))
        if projection.bias is not None:
            check_shape(op, f"bias {number}", projection.bias, (out,))
        if (projection.down is None) != (projection.up is None):
            raise ValueError(f"{op}: projection {number} has one half of an adapter, expected both or none")
        if projection.down is not None and projection.up is not None:
            rank = projection.down.shape[0]
            check_shape(op, f"down {number}", projection.down, (rank, width))
            check_shape(op, f"up {number}", projection.up, (out, rank))
        if residual is not None:
            check_shape(op, "residual", residual, (*x.shape[:-1], out))
    weights = [part for projection in projections for part in (projection.weight, projection.down)]
    form = choose(op, x, *weights, has_kernel=True, kernel_fits=x.numel() > 0, kernel_has_gradient=True)
    if form == "triton":
        from .kernel import lora_linear as kernel  # imports Triton, which need not be there

        return untraced(kernel)(x, projections, residual=residual)
    run = _reference if form == "reference" else _eager
    return run(x, projections, residual=residual)
