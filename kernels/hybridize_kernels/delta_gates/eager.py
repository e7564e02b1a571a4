"""The gates of the gated delta rule in plain PyTorch.

This file imports nothing but torch: exported models carry it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """log a = −exp(decay_rate) · softplus(W_a x + decay_bias) and b = beta_ceiling · sigmoid(W_b x + beta_bias).

    hidden: `[B, T, W]`; the weights `[H, W]`, the others `[H]`; real: `[B, T]` bool, False for padding, where both are
    0, or None. Returns `[B, T, H]` each, at least in fp32.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rate = torch.exp(decay_rate.to(dtype))
    log_decay = -rate * F.softplus(F.linear(hidden, decay_weight).to(dtype) + decay_bias.to(dtype))
    beta = beta_ceiling * torch.sigmoid(F.linear(hidden, beta_weight, beta_bias).to(dtype))
    if real is None:
        return log_decay, beta
    return torch.where(real[..., None], log_decay, 0.0), torch.where(real[..., None], beta, 0.0)
