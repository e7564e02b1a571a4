"""Rotary position embedding as its equation, pair by pair."""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `hybridize_kernels.rotary`; what the other forms must equal."""
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide.clone()
    for i in range(half):
        j = i + half
        y[..., i] = wide[..., i] * cos[:, :, None, i] - wide[..., j] * sin[:, :, None, i]
        y[..., j] = wide[..., j] * cos[:, :, None, j] + wide[..., i] * sin[:, :, None, j]
    return y.to(x.dtype)
