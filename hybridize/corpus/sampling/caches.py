"""Keys and values of rows that are each at a position of their own, and begin again when their text has ended.

A layer's cache is a ring of fixed size, so that a step is the same work at the same addresses every time, as a CUDA
graph needs it. `retained_decode` reads of it what a row has written since its text began, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from hybridize_kernels import retained_decode

IMPLEMENTATION = "hybridize_sampling"
"""Its name in transformers, which makes no mask for an implementation that it does not know."""


@dataclass
class LayerCache:
    """Of one layer: keys and values [B, H, slots, D], updated in place."""

    keys: Tensor
    values: Tensor
    workspace: dict[str, Tensor] = field(default_factory=dict)


class RowCaches:
    """The caches of all layers.

    Args:
        positions: [B] int64, of the token that each row reads next, from 0; changed by their owner between steps.
        slots: of each layer, in tokens: its sliding window, or more than the largest position.
    """

    def __init__(self, positions: Tensor, slots: Sequence[int]) -> None:
        self.positions = positions
        self.slots = tuple(slots)
        self._last_position = torch.full_like(positions, -1, dtype=torch.int32)
        self._layers: dict[int, LayerCache] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Takes one token a row into a layer's cache and attends from it.

        Args:
            q: [B, 1, HQ, D]. k, v: [B, 1, H, D]; rotary positions applied.
            scale: factor on q·k.

        Returns:
            [B, 1, HQ, D].
        """
        slots = self.slots[layer]
        if layer not in self._layers:
            batch, _, heads, head_size = k.shape
            keys = k.new_zeros(batch, heads, slots, head_size)
            self._layers[layer] = LayerCache(keys, torch.zeros_like(keys))
        cache = self._layers[layer]
        return retained_decode(
            q,
            k,
            v,
            cache.keys,
            cache.values,
            self._last_position,
            window=slots,
            positions=self.positions[:, None],
            scale=scale,
            workspace=cache.workspace,
        )


def sampling_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    caches: RowCaches,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers, for one token a row: query [B, HQ, 1, D], key and value [B, H, 1, D].

    Returns:
        [B, 1, HQ, D] and None.
    """
    layer: Any = module.layer_idx
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    return caches.attend(layer, q, k, v, scaling), None


AttentionInterface.register(IMPLEMENTATION, sampling_attention)
