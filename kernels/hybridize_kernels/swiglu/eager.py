"""SwiGLU in plain PyTorch, as transformers computes it.

This file imports nothing but torch: exported models carry it.
"""

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) · up, each `[..., I]`; without `up`, gate is `[..., 2 I]` and holds both, one after the other."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up
