"""Full attention, or a teacher's own sliding window: every slot is part of the window."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybridize.inference.full_attention import FullAttentionState
from hybridize.inference.steps.base import AttentionStep, Moment
from hybridize_kernels import retained_decode


class FullAttentionStep(AttentionStep):
    """See the module."""

    state: FullAttentionState

    def attend(self, q: Tensor, k: Tensor, v: Tensor, own: Sequence[Tensor], moment: Moment) -> Tensor:
        state = self.state
        return retained_decode(
            q,
            k,
            v,
            state["keys"],
            state["values"],
            state.last_position,
            window=state.slots,
            positions=moment.positions,
            scale=self.scale,
            workspace=state.workspace,
            rotary=moment.rotary,
        )
