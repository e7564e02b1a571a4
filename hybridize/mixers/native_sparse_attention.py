"""Native sparse attention: block means, the best blocks token by token and a window, summed by learned gates.

    o_i = g_cmp · attend(block means) + g_slc · attend(chosen blocks) + g_win · attend(window)

Source: Yuan et al., https://arxiv.org/abs/2502.11089. Unlike the paper, keys and values are pooled by their mean (no
new parameters), the three branches share the teacher's keys and values, and the gates start where the teacher is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.base import Mixer, MixerState, Rope
from hybridize.mixers.configs.native_sparse_attention import NativeSparseAttentionConfig
from hybridize_kernels import native_sparse_attention

BRANCHES = ("compressed", "selected", "window")


class BranchGates(nn.Module):
    """sigmoid(W x + b) for each query head and branch; W starts at 0, b at the configured values."""

    def __init__(self, config: NativeSparseAttentionConfig, geometry: AttentionGeometry) -> None:
        super().__init__()
        self.config = config
        self.branch_gates = nn.Linear(geometry.hidden_size, geometry.num_query_heads * len(BRANCHES))

    @torch.no_grad()
    def initialise(self) -> None:
        """Sets the weight and the bias, whatever was in their memory."""
        values = [getattr(self.config, f"{branch}_gate") for branch in BRANCHES]
        logits = torch.tensor([math.log(value / (1.0 - value)) for value in values])
        nn.init.zeros_(self.branch_gates.weight)
        self.branch_gates.bias.copy_(logits.repeat(self.branch_gates.out_features // len(BRANCHES)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, hidden_size] -> [B, T, HQ, 3] in the order of BRANCHES."""
        gates: Tensor = torch.sigmoid(self.branch_gates(hidden_states)).unflatten(-1, (-1, len(BRANCHES)))
        return gates


class NativeSparseAttention(Mixer):
    """See the module.

    State: keys (after RoPE) and values [B, S, H, D], positions [B, S] int32, and the running sums [B, blocks, H, D] of
    each block, so that no block is ever pooled twice. S counts the columns passed so far, padding included.
    """

    config_class = NativeSparseAttentionConfig

    def build_new(self) -> nn.Module:
        return BranchGates(self.config, self.geometry)

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k = rope(q), rope(k)
        gates = self.new(hidden_states)
        key_positions, key_means, value_means = positions, None, None
        if state is not None:
            k, v, key_positions, key_means, value_means = self._append(state, k, v, positions)
        out = native_sparse_attention(
            q,
            k,
            v,
            gates,
            block_size=self.config.block_tokens,
            num_selected_blocks=self.config.selected_blocks,
            window=self.config.window_tokens,
            query_positions=positions,
            key_positions=key_positions,
            dense_below=self.config.dense_below,
            scale=self.scale,
            compressed_k=key_means,
            compressed_v=value_means,
        )
        return out, {}

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        shape = (batch, 0, self.geometry.num_key_heads, self.geometry.head_size)
        wide = torch.promote_types(dtype, torch.float32)
        return MixerState(
            {
                "keys": torch.zeros(shape, device=device, dtype=dtype),
                "values": torch.zeros(shape, device=device, dtype=dtype),
                "positions": torch.zeros(batch, 0, device=device, dtype=torch.int32),
                "key_sums": torch.zeros(shape, device=device, dtype=wide),
                "value_sums": torch.zeros(shape, device=device, dtype=wide),
            }
        )

    def _append(
        self, state: MixerState, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Stores new tokens; returns all keys, values and positions, and the means of all blocks."""
        state["keys"] = torch.cat((state["keys"], k), dim=1)
        state["values"] = torch.cat((state["values"], v), dim=1)
        state["positions"] = torch.cat((state["positions"], positions.to(torch.int32)), dim=1)
        # A row has no more blocks than its columns fill: their number needs no look at the positions.
        blocks = -(-state["positions"].shape[1] // self.config.block_tokens)
        block = (positions.clamp(min=0) // self.config.block_tokens)[..., None, None]
        real = (positions >= 0)[..., None, None]
        means = []
        for name, x in (("key_sums", k), ("value_sums", v)):
            sums = state[name]
            grown = sums.new_zeros(sums.shape[0], blocks - sums.shape[1], *sums.shape[2:])
            added = torch.where(real, x, 0.0).to(sums.dtype)
            sums = torch.cat((sums, grown), dim=1).scatter_add(1, block.expand_as(x), added)
            state[name] = sums
            means.append((sums / self.config.block_tokens).to(x.dtype))
        return state["keys"], state["values"], state["positions"].long(), means[0], means[1]
