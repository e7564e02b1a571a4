"""What is held of a text while a policy reads it: retained tokens head by head, and the recent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize.mixers.base import MixerState

RECENT = ("near_keys", "near_values", "near_worth")


class PolicyState(MixerState):
    """Tensors: keys and values [B, H, n, D] after rotary embedding, positions and worth [B, H, n], and `last_queries`
    [B, n, HQ, D]. Recent tokens are consecutive and end with the last token that was read."""

    def __init__(self, batch: int, heads: int, query_heads: int, head_size: int, like: Tensor) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(batch, *shape, device=like.device, dtype=dtype)

        vectors, worth = (heads, 0, head_size), (heads, 0)
        super().__init__(
            {
                "kept_keys": empty(*vectors, dtype=like.dtype),
                "kept_values": empty(*vectors, dtype=like.dtype),
                "kept_positions": empty(*worth, dtype=torch.int64),
                "kept_worth": empty(*worth, dtype=torch.float32),
                "near_keys": empty(*vectors, dtype=like.dtype),
                "near_values": empty(*vectors, dtype=like.dtype),
                "near_worth": empty(*worth, dtype=torch.float32),
                "last_queries": empty(0, query_heads, head_size, dtype=like.dtype),
            }
        )
        self.chosen_below = 0
        """Tokens before this position have competed."""

    def reset(self) -> None:
        super().reset()
        self.chosen_below = 0

    @property
    def num_kept(self) -> int:
        """Retained tokens of each head."""
        return self["kept_keys"].shape[2]

    @property
    def num_near(self) -> int:
        """Recent tokens."""
        return self["near_keys"].shape[2]

    def positions(self, end: int) -> Tensor:
        """[B, H, n], of the retained tokens and then of the recent ones, when `end` tokens have been read."""
        kept = self["kept_positions"]
        near = torch.arange(end - self.num_near, end, device=kept.device)
        return torch.cat((kept, near.expand(*kept.shape[:2], -1)), dim=2)

    def held(self, name: str) -> Tensor:
        """ "keys", "values" or "worth" of the retained tokens and then of the recent ones."""
        return torch.cat((self[f"kept_{name}"], self[f"near_{name}"]), dim=2)

    def append(self, k: Tensor, v: Tensor, worth: Tensor) -> None:
        """Takes in further tokens, k and v [B, H, n, D], worth [B, H, n]."""
        for name, new in zip(RECENT, (k, v, worth), strict=True):
            self[name] = torch.cat((self[name], new.to(self[name].dtype)), dim=2)

    def forget_before(self, position: int, end: int) -> None:
        """Drops recent tokens before a position."""
        first = end - self.num_near
        if position > first:
            for name in RECENT:
                # A view would keep the whole text alive.
                self[name] = self[name][:, :, position - first :].clone()
