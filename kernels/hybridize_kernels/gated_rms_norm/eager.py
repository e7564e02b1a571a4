"""The gated RMSNorm in plain PyTorch, at least in fp32 whatever the types around it.

This file imports nothing but torch: exported models carry it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_rms_norm(x: Tensor, scale: Tensor, gate: Tensor | None = None, *, epsilon: float | None = 1e-6) -> Tensor:
    """x · rsqrt(mean x² + epsilon) · scale · 2 sigmoid(gate), the mean over the head; in x's dtype.

    x: `[B, T, H, D]`; scale: `[H, D]`; gate: `[B, T, H, D]`, or None for a gate of 1; epsilon: None for no norm.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if epsilon is not None:
        y = F.rms_norm(y, y.shape[-1:], eps=epsilon)
    y = y * scale.to(dtype)
    if gate is not None:
        y = y * (2.0 * torch.sigmoid(gate.to(dtype)))
    return y.to(x.dtype)
