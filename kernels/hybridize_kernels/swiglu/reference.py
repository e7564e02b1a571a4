"""SwiGLU as its equation."""

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `hybridize_kernels.swiglu`; what the other forms must equal."""
    if up is None:
        half = gate.shape[-1] // 2
        gate, up = gate[..., :half], gate[..., half:]
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    gate, up = gate.to(wide), up.to(wide)
    return (gate * torch.sigmoid(gate) * up).to(dtype)
