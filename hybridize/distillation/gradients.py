"""What lies between a backward pass and the optimiser: norms and clipping, without a wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SMALL = 1e-6
"""Added to a norm before dividing by it, as in `torch.nn.utils.clip_grad_norm_`."""


@dataclass(frozen=True)
class Norms:
    """Of the gradients of a step.

    Attributes:
        total: a scalar, of all gradients together.
        parameters: those that have a gradient, and `each` [their number] the norm of each one's.
    """

    total: Tensor
    parameters: tuple[nn.Parameter, ...]
    each: Tensor


@torch.no_grad()
def clip(groups: Sequence[Sequence[nn.Parameter]], largest: float) -> Norms:
    """Scales the gradients of each group whose common norm is above `largest` down to it; returns the norms before."""
    found: list[nn.Parameter] = []
    norms: list[Tensor] = []
    for group in groups:
        with_gradient = [parameter for parameter in group if parameter.grad is not None]
        if not with_gradient:
            continue
        gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
        each = torch.stack([_whole(norm) for norm in torch._foreach_norm(gradients)])
        factor = (largest / (torch.linalg.vector_norm(each) + _SMALL)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        found += with_gradient
        norms.append(each)
    each = torch.cat(norms)
    return Norms(torch.linalg.vector_norm(each), tuple(found), each)


def _whole(norm: Tensor) -> Tensor:
    """The norm of a gradient that is sharded over processes, from those of its parts."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[no-any-return]
