"""Sliding window and sinks: see `hybridize.mixers.sliding_window`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hybridize.inference.steps.base import AttentionStep, Moment
from hybridize_kernels import retained_decode


class SlidingWindowStep(AttentionStep):
    """See the module."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, own: Sequence[Tensor], moment: Moment) -> Tensor:
        state, config = self.state, self.attention.config
        return retained_decode(
            q,
            k,
            v,
            state["keys"],
            state["values"],
            state["last_position"],
            window=config.window_tokens,
            sinks=config.sink_tokens,
            positions=moment.positions,
            scale=self.scale,
            workspace=state.workspace,
            rotary=moment.rotary,
            **self.retained(),
        )

    def retained(self) -> dict[str, Any]:
        """What says which tokens stay, by the op's names; nothing: the sinks alone."""
        return {}
