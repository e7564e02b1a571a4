"""Native sparse attention: pooled blocks, the best blocks token by token and a window, summed by learned gates.

    o_i = g_cmp · attend(pooled blocks) + g_slc · attend(chosen blocks) + g_win · attend(window)

Source: Yuan et al., https://arxiv.org/abs/2502.11089. Unlike the paper, keys and values are pooled by a weighted sum
that starts as their mean, or by the mean itself; the choice of blocks learns from full attention (see
`block_attention`); the three branches share the teacher's keys and values; and the gates start where the teacher is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.base import Mixer, MixerState, Rope
from hybridize.mixers.configs.native_sparse_attention import NativeSparseAttentionConfig
from hybridize.mixers.parts.block_attention import block_attention_loss
from hybridize.mixers.parts.position_slots import PositionState
from hybridize.mixers.parts.slots import make_writable
from hybridize_kernels import native_sparse_attention, native_sparse_decode

BRANCHES = ("compressed", "selected", "window")


class NativeSparseParameters(nn.Module):
    """The gates, sigmoid(W x + b) for each query head and branch (W starts at 0, b at the configured values), and with
    a learned compression the weights [block, H, D] that pool a block (they start as its mean)."""

    def __init__(self, config: NativeSparseAttentionConfig, geometry: AttentionGeometry) -> None:
        super().__init__()
        self.config = config
        self.branch_gates = nn.Linear(geometry.hidden_size, geometry.num_query_heads * len(BRANCHES))
        shape = config.block_tokens, geometry.num_key_heads, geometry.head_size
        learned = config.compression == "learned"
        self.key_pooling = nn.Parameter(torch.empty(shape)) if learned else None
        self.value_pooling = nn.Parameter(torch.empty(shape)) if learned else None

    @torch.no_grad()
    def initialise(self) -> None:
        """Sets every parameter, whatever was in its memory."""
        values = [getattr(self.config, f"{branch}_gate") for branch in BRANCHES]
        logits = torch.tensor([math.log(value / (1.0 - value)) for value in values])
        nn.init.zeros_(self.branch_gates.weight)
        self.branch_gates.bias.copy_(logits.repeat(self.branch_gates.out_features // len(BRANCHES)))
        for weights in self.pooling.values():
            nn.init.constant_(weights, 1.0 / self.config.block_tokens)

    @property
    def pooling(self) -> dict[str, Tensor]:
        """The weights by the ops' names; nothing where blocks are pooled by their mean."""
        if self.key_pooling is None or self.value_pooling is None:
            return {}
        return {"key_pooling": self.key_pooling, "value_pooling": self.value_pooling}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, hidden_size] -> gates [B, T, HQ, 3] in the order of BRANCHES."""
        gates: Tensor = torch.sigmoid(self.branch_gates(hidden_states)).unflatten(-1, (-1, len(BRANCHES)))
        return gates


class NativeSparseAttention(Mixer):
    """See the module.

    State: keys (after RoPE) and values by position, the pooled keys and values of each complete block, and the lengths
    of the rows. It grows in steps; `reserve` of the state makes it large enough at once, for a captured graph.
    """

    config_class = NativeSparseAttentionConfig

    def build_new(self) -> nn.Module:
        return NativeSparseParameters(self.config, self.geometry)

    def initialise_new(self) -> None:
        self.new.initialise()

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden_states: Tensor,
        rope: Rope,
        state: MixerState | None,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k = rope(q, k)
        gates = self.new(hidden_states)
        if state is None:
            auxiliary = self._losses(q, k, positions, cu_seqlens) if self.training else {}
            return self._attend(q, k, v, gates, positions, cu_seqlens), auxiliary
        assert isinstance(state, PositionState)
        make_writable(state.tensors)
        state.make_room(self.config.capacity(state.seen_tokens + q.shape[1]))
        if q.shape[1] == 1 and not torch.is_grad_enabled():
            return self._decode(q, k, v, gates, state, positions), {}
        if state.seen_tokens == 0:
            with torch.no_grad():
                state.store(k, v, positions, self.padded, self.new.pooling)
            return self._attend(q, k, v, gates, positions), {}
        return self._append(q, k, v, gates, state, positions), {}

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> PositionState:
        if torch.is_autocast_enabled(
            device.type
        ):  # norms of queries and keys are in fp32 then, what is attended to is not
            dtype = torch.get_autocast_dtype(device.type)
        geometry, like = self.geometry, torch.empty(0, device=device, dtype=dtype)
        return PositionState(batch, geometry.num_key_heads, geometry.head_size, self.config.block_tokens, like)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "block_size": self.config.block_tokens,
            "num_selected_blocks": self.config.selected_blocks,
            "window": self.config.window_tokens,
            "dense_below": self.config.dense_below,
            "scale": self.scale,
        }

    def _losses(self, q: Tensor, k: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
        weight = self.config.block_attention
        if not weight:
            return {}
        loss = block_attention_loss(
            q,
            k,
            block_tokens=self.config.block_tokens,
            positions=positions,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
            key_pooling=self.new.key_pooling,
            first_position=self.config.dense_below,
        )
        return {"block_attention": weight * loss}

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, positions: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Over these tokens alone."""
        in_order = positions if self.padded else None
        return native_sparse_attention(
            q,
            k,
            v,
            gates,
            query_positions=in_order,
            key_positions=in_order,
            cu_seqlens=cu_seqlens,
            **self._options,
            **self.new.pooling,
        )

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: PositionState, positions: Tensor
    ) -> Tensor:
        return native_sparse_decode(
            q,
            k,
            v,
            gates,
            state["keys"],
            state["values"],
            state["compressed_keys"],
            state["compressed_values"],
            state["lengths"],
            positions=positions,
            workspace=state.workspace,
            **self._options,
            **self.new.pooling,
        )

    def _append(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: PositionState, positions: Tensor
    ) -> Tensor:
        """Takes T further tokens into the state and attends from them."""
        held = state.store(k, v, positions, self.padded, self.new.pooling)
        return native_sparse_attention(
            q,
            held["keys"],
            held["values"],
            gates,
            query_positions=positions,
            key_lengths=held["lengths"],
            compressed_k=held["compressed_keys"],
            compressed_v=held["compressed_values"],
            **self._options,
        )
