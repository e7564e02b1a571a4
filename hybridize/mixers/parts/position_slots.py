"""A decoding state that keeps every token by position, and every complete block of them pooled.

`native_sparse_decode` writes it a token at a time; here is what many tokens at once need. The token at position p lies
in slot p, whatever padding came before it; a block is pooled once, when its last token has come.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridize.mixers.base import MixerState
from hybridize.mixers.parts.slots import make_writable
from hybridize.mixers.parts.snapshot import Snapshot


class PositionState(MixerState):
    """Tensors "keys", "values" [B, slots, H, D], "compressed_keys", "compressed_values" [B, slots // block, H, D] and
    "lengths" [B] int32: tokens so far.

    Attributes:
        may_grow: False: whoever has reserved its slots answers for it that no row needs more.
    """

    may_grow = True

    def __init__(self, batch: int, heads: int, head_size: int, block_tokens: int, like: Tensor) -> None:
        """An empty state without slots, in the type and on the device of `like`."""
        empty = ("keys", "values", "compressed_keys", "compressed_values")
        tensors = {name: like.new_zeros(batch, 0, heads, head_size) for name in empty}
        super().__init__({**tensors, "lengths": like.new_zeros(batch, dtype=torch.int32)})
        self.block_tokens = block_tokens

    def make_room(self, slots: int) -> None:
        """Grows to so many slots, a multiple of the block, if there are fewer and it may."""
        if slots <= self["keys"].shape[1] or not self.may_grow:
            return
        for name, size in self._sizes(slots).items():
            old = self[name]
            self[name] = old.new_zeros(old.shape[0], size, *old.shape[2:])
            self[name][:, : old.shape[1]] = old

    def reserve(self, slots: int) -> None:
        """Makes room once for all that is to come: no step moves the state from then on, nor does a reset, so that a
        captured graph may go on with it. slots: what the configuration's `capacity` says of the tokens to come."""
        make_writable(self.tensors)
        self.make_room(-(-slots // self.block_tokens) * self.block_tokens)
        for name in self._sizes(slots):
            self._shapes[name] = self[name].shape[1:]

    def restore(self, saved: Snapshot) -> None:
        """As the base; slots that were reserved meanwhile stay, empty."""
        tensors = dict(saved.tensors)
        for name in self._sizes(0):
            missing = self._shapes[name][0] - tensors[name].shape[1]
            if missing > 0:
                tensors[name] = F.pad(tensors[name], (0, 0, 0, 0, 0, missing))
        super().restore(replace(saved, tensors=tensors))

    def store(
        self, k: Tensor, v: Tensor, positions: Tensor, padded: bool, pooling: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Takes T tokens in.

        Args:
            k, v: [B, T, H, D]. positions: [B, T], following the lengths; −1 only if `padded`.
            pooling: "key_pooling" and "value_pooling" [block, H, D], or nothing: the mean.

        Returns:
            The state as it then is; while gradients are recorded, copies through which they reach k, v and pooling.
        """
        grad = torch.is_grad_enabled()
        tensors = {name: x.clone() for name, x in self.tensors.items()} if grad else self.tensors
        before = tensors["lengths"].clone()
        tensors["lengths"].copy_(torch.maximum(before, positions.amax(1) + 1))
        for new, name, weights in (
            (k, "keys", pooling.get("key_pooling")),
            (v, "values", pooling.get("value_pooling")),
        ):
            _put(tensors[name], new, positions, padded)
            pooled = tensors[f"compressed_{name}"]
            _pool(tensors[name], pooled, self.block_tokens, before, tensors["lengths"], k.shape[1], weights)
        if grad:
            with torch.no_grad():
                for name, x in tensors.items():
                    self[name].copy_(x)
        return tensors

    def _sizes(self, slots: int) -> dict[str, int]:
        blocks = slots // self.block_tokens
        return {"keys": slots, "values": slots, "compressed_keys": blocks, "compressed_values": blocks}


def _put(slots: Tensor, new: Tensor, positions: Tensor, padded: bool) -> None:
    """Writes new [B, T, H, D] by position; padding is left out."""
    if padded:
        rows, columns = (positions >= 0).nonzero(as_tuple=True)
        slots[rows, positions[rows, columns]] = new[rows, columns].to(slots.dtype)
    else:
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        slots[rows, positions] = new.to(slots.dtype)


def _pool(
    slots: Tensor,
    pooled: Tensor,
    block_tokens: int,
    before: Tensor,
    after: Tensor,
    num_new: int,
    weights: Tensor | None,
) -> None:
    """Pools the blocks that were completed when the lengths [B] grew by at most `num_new`."""
    num_blocks = pooled.shape[1]
    if num_blocks == 0:
        return
    # As many blocks as may have been completed, from the first that was not; which of them are is told on the device.
    count = min(num_new // block_tokens + 1, num_blocks)
    first = before.long() // block_tokens
    block = first.clamp(max=num_blocks - count)[:, None] + torch.arange(count, device=slots.device)  # [B, count]
    token = block[..., None] * block_tokens + torch.arange(block_tokens, device=slots.device)
    rows = torch.arange(len(block), device=slots.device)[:, None]
    tokens = slots[rows[..., None], token]  # [B, count, block, H, D]
    wide = torch.promote_types(slots.dtype, torch.float32)
    new = tokens.mean(2, dtype=wide) if weights is None else (weights.to(wide) * tokens.to(wide)).sum(2)
    complete = (block >= first[:, None]) & (block < (after // block_tokens)[:, None])
    pooled[rows, block] = torch.where(complete[..., None, None], new.to(pooled.dtype), pooled[rows, block])
