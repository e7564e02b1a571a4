"""The gates of the gated delta rule from hidden states: how fast a head forgets, and how much it corrects."""

import torch
from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import delta_gates as _eager
from .reference import delta_gates as _reference

__all__ = ["delta_gates"]

MAX_HEADS = 64  # all heads of a token lie in a tile
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def delta_gates(
    hidden: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    decay_rate: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor,
    *,
    beta_ceiling: float = 1.0,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log a = −exp(decay_rate) · softplus(W_a x + decay_bias), b = beta_ceiling · sigmoid(W_b x + beta_bias).

    Both products are those of a linear layer, rounded to its type (autocast's, where that is on); the rest is in fp32.

    Args:
        hidden: `[B, T, W]`.
        decay_weight, beta_weight: `[H, W]`. decay_bias, decay_rate, beta_bias: `[H]`.
        beta_ceiling: 1, or 2 for negative eigenvalues.
        real: `[B, T]` bool, False for padding, where both gates are 0; None: there is none.

    Returns:
        log a and b, `[B, T, H]` each, in fp32 (fp64 for fp64 hidden states). Gradients for everything but `real`, each
        in its own dtype.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Yang et al., https://arxiv.org/abs/2412.06464, section 3; the form of a is Mamba 2's.
    """
    op = "delta_gates"
    if hidden.ndim != 3:
        raise ValueError(f"{op}: hidden has shape {list(hidden.shape)}, expected [batch, time, width]")
    batch, time, width = hidden.shape
    heads = decay_rate.shape[0]
    for name, weight in (("decay_weight", decay_weight), ("beta_weight", beta_weight)):
        check_shape(op, name, weight, (heads, width))
    for name, vector in (("decay_bias", decay_bias), ("decay_rate", decay_rate), ("beta_bias", beta_bias)):
        check_shape(op, name, vector, (heads,))
    if real is not None:
        check_shape(op, "real", real, (batch, time))
    parameters = (decay_weight, decay_bias, decay_rate, beta_weight, beta_bias)
    form = choose(
        op, hidden, *parameters, has_kernel=True, kernel_fits=_fits(hidden, *parameters), kernel_has_gradient=True
    )
    if form == "triton":
        from .kernel import delta_gates as kernel  # imports Triton, which need not be there

        run = untraced(kernel)
    else:
        run = _reference if form == "reference" else _eager
    return run(hidden, *parameters, beta_ceiling=beta_ceiling, real=real)


def _fits(hidden: Tensor, *parameters: Tensor) -> bool:
    """Whether the kernels cover these sizes and types; without autocast a linear layer takes one type alone."""
    mixed = torch.is_autocast_enabled(hidden.device.type)
    alike = mixed or all(weight.dtype == hidden.dtype for weight in (parameters[0], parameters[3], parameters[4]))
    known = all(x.dtype in KERNEL_DTYPES for x in (hidden, *parameters))
    return alike and known and hidden.numel() > 0 and parameters[0].shape[0] <= MAX_HEADS
