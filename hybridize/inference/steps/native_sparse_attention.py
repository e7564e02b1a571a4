"""Native sparse attention: see `hybridize.mixers.native_sparse_attention`. The gates are part of the projection."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hybridize.inference.steps.base import AttentionStep, Moment, heads_of
from hybridize_kernels import native_sparse_decode, rotary


class NativeSparseAttentionStep(AttentionStep):
    """See the module."""

    def own_projections(self) -> Sequence[nn.Linear]:
        return [self.attention.new.branch_gates]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, own: Sequence[Tensor], moment: Moment) -> Tensor:
        state, config = self.state, self.attention.config
        q, k = rotary(q, k, *moment.rotary)
        return native_sparse_decode(
            q,
            k,
            v,
            heads_of(own[0].sigmoid(), 3),
            state["keys"],
            state["values"],
            state["compressed_keys"],
            state["compressed_values"],
            state["lengths"],
            block_size=config.block_tokens,
            num_selected_blocks=config.selected_blocks,
            window=config.window_tokens,
            dense_below=config.dense_below,
            positions=moment.positions,
            scale=self.scale,
            workspace=state.workspace,
            **self.attention.new.pooling,
        )
