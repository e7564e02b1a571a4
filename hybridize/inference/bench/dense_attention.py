"""A static cache whose place is known beforehand, and torch's attention over its filled slots without a mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin

from hybridize.model.packed_attention import packed_attention

IMPLEMENTATION = "hybridize_dense"
"""Its name in transformers, which makes no mask for an implementation that it does not know."""


class Slots(CacheLayerMixin):
    """Keys and values of one layer, [B, H, S, D] each.

    transformers' static layer counts its tokens on the device and finds the place of new ones by three small kernels;
    here the host says it (`start`, `end`), which costs none, and only what is filled is shown.
    """

    is_sliding = False
    is_compileable = True
    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self, both: Tensor) -> None:
        """both: [2, B, H, S, D], keys and values."""
        super().__init__()
        self.keys, self.values = both.unbind(0)
        self.start = self.end = 0
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the slots are there from the beginning."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new tokens into the slots start .. end; returns the slots before end."""
        self.keys[:, :, self.start : self.end].copy_(key_states)
        self.values[:, :, self.start : self.end].copy_(value_states)
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def get_seq_length(self) -> int:
        return self.start

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return self.end, 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: causal, without padding.

    Args:
        query: [B, HQ, T, D]. key, value: [B, H, S, D]; the queries are the last T of S tokens.
        attention_mask: none is made for it.
        scaling: factor on q·k.
        sliding_window: tokens of the model's own window, the query itself included; None: all.

    Returns:
        [B, T, HQ, D] and None.
    """
    batch, query_heads, num_queries, head_size = query.shape
    if sliding_window is not None and sliding_window < key.shape[2]:
        if num_queries > 1:
            return packed_attention(module, query, key, value, None, scaling=scaling, sliding_window=sliding_window)
        key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
    heads, num_keys = key.shape[1:3]
    if num_queries == 1:
        # The queries of a key head side by side: its keys are read once, in any kernel.
        grouped = query.reshape(batch, heads, query_heads // heads, head_size)
        out = scaled_dot_product_attention(grouped, key, value, scale=scaling)
        return out.reshape(batch, 1, query_heads, head_size), None
    causal: dict[str, Any] = {"is_causal": True}
    if num_queries < num_keys:
        causal = {"attn_mask": causal_lower_right(num_queries, num_keys)}
    shared = query_heads != heads
    out = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=shared, **causal)
    return out.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, dense_attention)
