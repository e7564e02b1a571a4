"""Rotary position embedding in plain PyTorch, in the order of transformers' own: the two are equal bit for bit.

This file imports nothing but torch: exported models carry it.
"""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x · cos + rotate_half(x) · sin over the first R numbers of every head, in the dtype of each x.

    q: `[B, T, HQ, D]`; k: `[B, T, H, D]`; cos, sin: `[B or 1, T, R]`.
    """
    return _rotated(q, cos.unsqueeze(2), sin.unsqueeze(2)), _rotated(k, cos.unsqueeze(2), sin.unsqueeze(2))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    y = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return torch.cat((y, rest), dim=-1) if rest.shape[-1] else y
