"""RMSNorm in plain PyTorch, in the order of transformers' own: in one dtype the two are equal bit for bit.

This file imports nothing but torch: exported models carry it.
"""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, *, epsilon: float, residual: Tensor | None = None, return_sum: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """s · rsqrt(mean s² + epsilon) · weight with s = residual + x, or x without a residual.

    x, residual: `[..., D]`; weight: `[D]`. Returns y, or (y, s) with a residual or where s is asked for, in
    the dtype of s.
    """
    s = x if residual is None else residual + x
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    y = (weight * wide.to(s.dtype)).to(s.dtype)
    return (y, s) if return_sum or residual is not None else y
