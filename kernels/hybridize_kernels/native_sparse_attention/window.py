"""The window branch: retained attention with nothing retained, without autograd between it and this op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..retained_attention.attention import Attended, attend_once, call_of, gradients_of
from .places import Places


class Window(NamedTuple):
    """A forward pass; tokens: `[B, n]` those of its keys among all, −1 for none, where it has not all of them."""

    attended: Attended
    tokens: Tensor | None


def attend_window(q: Tensor, k: Tensor, v: Tensor, places: Places, *, window: int, scale: float) -> Window:
    """Attention of each query `[B, T, HQ, D]` to the last `window` tokens up to itself."""
    k, v, tokens, order = places.of_windows(q, k, v, window)
    return Window(attend_once(q, k, v, None, call_of(k, window=window, scale=scale, **order)), tokens)


def window_gradients(passed: Window, d_output: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and dk and dv `[B, keys, H, D]` of all keys, contiguous."""
    dq, dk, dv, _ = gradients_of(passed.attended, None, d_output, None)
    return dq, _of_all(dk, passed.tokens, keys), _of_all(dv, passed.tokens, keys)


def _of_all(gradient: Tensor, tokens: Tensor | None, keys: int) -> Tensor:
    if tokens is None:
        return gradient
    batch, _, heads, size = gradient.shape
    # What is no key goes to one slot more, which is cut off.
    slot = torch.where(tokens < 0, keys, tokens)[..., None, None].expand_as(gradient)
    whole = gradient.new_zeros(batch, keys + 1, heads, size).scatter(1, slot, gradient)
    return whole[:, :keys].contiguous()
