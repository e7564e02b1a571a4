"""What lies between a backward pass and the optimiser: norms and clipping. No wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridize.distillation.sharding import is_sharded, own_part

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
def clip(groups: Sequence[Sequence[nn.Parameter]], largest: float, add_up: Callable[[Tensor], Tensor]) -> Norms:
    """Scales the gradients of each group whose common norm is above `largest` down to it; returns the norms before.

    Args:
        add_up: the sum of a tensor over all processes; asked once, and only if a gradient is sharded.
    """
    with_gradient = [[parameter for parameter in group if parameter.grad is not None] for group in groups]
    found = [parameter for group in with_gradient for parameter in group]
    gradients = [own_part(parameter.grad) for parameter in found if parameter.grad is not None]
    each = _of_wholes(torch.stack(torch._foreach_norm(gradients)), found, add_up)
    start = 0
    for group in with_gradient:
        own = slice(start, start := start + len(group))
        if group:
            factor = (largest / (torch.linalg.vector_norm(each[own]) + _SMALL)).clamp(max=1.0)
            torch._foreach_mul_(gradients[own], factor)
    return Norms(torch.linalg.vector_norm(each), tuple(found), each)


def _of_wholes(norms: Tensor, parameters: Sequence[nn.Parameter], add_up: Callable[[Tensor], Tensor]) -> Tensor:
    """The norms of whole gradients, from those of this process's parts of the ones that are sharded."""
    sharded = [is_sharded(parameter) for parameter in parameters]
    if not any(sharded):
        return norms
    of_parts = torch.tensor(sharded).to(norms.device, non_blocking=True)
    squares = add_up(torch.where(of_parts, norms.square(), 0.0))
    return torch.where(of_parts, squares.sqrt(), norms)
