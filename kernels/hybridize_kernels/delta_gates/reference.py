"""The gates of the gated delta rule as their equations."""

import torch
from torch import Tensor


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
    """See `hybridize_kernels.delta_gates`; what the other forms must equal."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden.to(dtype)
    if real is not None:
        x = torch.where(real[..., None], x, 0.0)
    decay = (x[:, :, None] * decay_weight.to(dtype)).sum(-1) + decay_bias.to(dtype)
    beta = (x[:, :, None] * beta_weight.to(dtype)).sum(-1) + beta_bias.to(dtype)
    log_decay = -torch.exp(decay_rate.to(dtype)) * torch.logaddexp(decay, torch.zeros_like(decay))
    beta = beta_ceiling / (1 + torch.exp(-beta))
    is_real = torch.ones_like(log_decay[..., :1]) if real is None else real[..., None].to(dtype)
    return log_decay * is_real, beta * is_real
