"""A fixed-size decoding state: a ring of the last W tokens, and slots for older ones, in one buffer a key head.

Tensors of the state are [B, H, W + C, ...]: position p lies in slot p mod W, the slots from W on hold what was
retained. `retained_decode` writes it a token at a time; here is what many tokens at once need. They are attended to
together with the state as *entries* [B, S, H, ...]: what is retained, the ring in order of position, the new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, ...] at index [B, n] or, head by head, [B, n, H] -> [B, n, ...]."""
    index = index.view(index.shape + (1,) * (x.ndim - index.ndim))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def make_writable(tensors: dict[str, Tensor]) -> None:
    """Replaces by copies what was made in inference mode and may not be written outside of it."""
    for name, tensor in tensors.items():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            tensors[name] = tensor.clone()


def ring_positions(last: Tensor, window: int) -> Tensor:
    """last [B], the newest position -> [B, W]: the ring's positions in order, -1 where nothing lies."""
    steps_back = torch.arange(window - 1, -1, -1, device=last.device)
    return (last.long()[:, None] - steps_back).clamp(min=-1)


def entries_of(x: Tensor, retained: Tensor, last: Tensor, window: int, new: Tensor) -> Tensor:
    """The entries of one tensor of the state.

    Args:
        x: [B, H, W + C, ...]. retained: [B, H or 1, n] order in which to take the slots 0 .. C - 1 beside the ring.
        last: [B], newest position in the ring. new: [B, T, H, ...].

    Returns:
        [B, n + W + T, H, ...].
    """
    heads = x.shape[1]
    ring = ring_positions(last, window).clamp(min=0) % window  # [B, W]
    index = torch.cat((window + retained.expand(-1, heads, -1), ring[:, None].expand(-1, heads, -1)), dim=2)
    index = index.view(*index.shape, *(1,) * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:])
    return torch.cat((x.gather(2, index).transpose(1, 2), new.to(x.dtype)), dim=1)


def real_tokens_first(positions: Tensor) -> Tensor:
    """positions [B, T] -> [B, T]: the columns of tokens in the order they were, then those of padding."""
    return (positions < 0).to(torch.uint8).argsort(dim=1, stable=True)


def entry_columns(wanted: Tensor, before: Tensor, order: Tensor | None, num_new: int, num_entries: int) -> Tensor:
    """Columns of entries that lie in the ring or are new, by their positions.

    Args:
        wanted: [B, n] positions (any column where none is of that position). before: [B] newest position in the ring.
        order: [B, T], `real_tokens_first` of the new positions, or None where none of them is padding.
        num_new: T. num_entries: S.
    """
    steps = wanted - before.long()[:, None]  # 1 is the first new token, 0 the last of the ring
    new = (steps - 1).clamp(0, num_new - 1)
    if order is not None:
        new = order.gather(1, new)
    old_entries = num_entries - num_new
    return torch.where(steps > 0, old_entries + new, (old_entries - 1 + steps).clamp(min=0))


def ring_held(last: Tensor, window: int) -> Tensor:
    """last [B], the newest position -> [B, W]: the position in each slot of the ring, below 0 where nothing lies."""
    newest = last.long()[:, None]
    return newest - (newest - torch.arange(window, device=last.device)) % window
