"""The gated RMSNorm as its equation."""

import torch
from torch import Tensor


def gated_rms_norm(x: Tensor, scale: Tensor, gate: Tensor | None = None, *, epsilon: float | None = 1e-6) -> Tensor:
    """See `hybridize_kernels.gated_rms_norm`; what the other forms must equal."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if epsilon is not None:
        y = y / (y.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    y = y * scale.to(dtype)
    if gate is not None:
        y = y * 2.0 / (1.0 + torch.exp(-gate.to(dtype)))
    return y.to(x.dtype)
