"""Reading and writing the slots of a fixed-size decoding state."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, ...] at index [B, n] or, head by head, [B, n, H] -> [B, n, ...]."""
    return x.gather(1, _spread(index, x))


def put(x: Tensor, index: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """Writes values [B, 1, ...] to slot index [B, 1] or [B, 1, H] of x [B, S, ...] where valid [B, 1]; in place.

    Returns the written tensor: a copy of x if x was made in inference mode and may not be written outside of it.
    """
    if x.is_inference() and not torch.is_inference_mode_enabled():
        x = x.clone()
    index = _spread(index, x)
    valid = valid.view(valid.shape + (1,) * (x.ndim - valid.ndim))
    return x.scatter_(1, index, torch.where(valid, values.to(x.dtype), x.gather(1, index)))


def _spread(index: Tensor, x: Tensor) -> Tensor:
    index = index.view(index.shape + (1,) * (x.ndim - index.ndim))
    return index.expand(-1, -1, *x.shape[2:])
