"""A norm and the linear layer that reads it, as their equations."""

import torch
from torch import Tensor


@torch.no_grad()
def norm_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """See `hybridize_kernels.norm_linear`; what the other forms must equal."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(dtype)
    if norm_weight is not None and epsilon is not None:
        root_mean_square = (rows.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
        rows = rows / root_mean_square * norm_weight.to(dtype)
    y = rows @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "swiglu":
        half = y.shape[-1] // 2
        gate, up = y[..., :half], y[..., half:]
        y = gate * torch.sigmoid(gate) * up
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)
