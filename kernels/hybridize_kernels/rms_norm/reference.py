"""RMSNorm as its equation."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, *, epsilon: float, residual: Tensor | None = None, return_sum: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See `hybridize_kernels.rms_norm`; what the other forms must equal."""
    s = x if residual is None else residual + x
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    root_mean_square = (wide.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    normalised = (wide / root_mean_square).to(s.dtype)
    y = (weight * normalised).to(s.dtype)
    return (y, s) if return_sum or residual is not None else y
