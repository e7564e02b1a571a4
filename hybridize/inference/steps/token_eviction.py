"""Token eviction: see `hybridize.mixers.token_eviction`. Scores are left to the end of the step.

The score that a token completes is that of one m positions before it, which leaves the window m tokens later than this
step at the earliest: nothing in this step reads it. So all layers are scored at once, when all have attended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.inference.states import States
from hybridize.inference.steps.base import Moment
from hybridize.inference.steps.sliding_window import SlidingWindowStep
from hybridize.mixers.parts.retention_mixer import SCORE_GRID
from hybridize_kernels import retention_scores_step


class TokenEvictionStep(SlidingWindowStep):
    """See the module.

    Attributes:
        layer: its index.
        keys, values: [B, 1, H, D] before RoPE, of the last step: what the scorer reads.
    """

    keys: Tensor
    values: Tensor

    @property
    def layer(self) -> int:
        return int(self.attention.layer_idx)

    @classmethod
    def takes(cls, attention: Any) -> bool:
        return bool(attention.config.margin_tokens > 0)  # else a step reads the score that it makes

    def attend(self, q: Tensor, k: Tensor, v: Tensor, own: Sequence[Tensor], moment: Moment) -> Tensor:
        self.keys, self.values = k, v
        return super().attend(q, k, v, own, moment)

    def retained(self) -> dict[str, Any]:
        return {name: self.state[name] for name in ("scores", "retained_positions", "num_retained")}


class Scoring:
    """The scorers of layers with one configuration, at the end of a step.

    Args:
        steps: of these layers.
        states: their scores and histories are laid side by side.
    """

    def __init__(self, steps: Sequence[TokenEvictionStep], states: States) -> None:
        self.steps = steps
        self.config = steps[0].attention.config
        self.stacks = states.stack([step.layer for step in steps])
        scorers = [step.attention.new.scorer for step in steps]
        self.weights = [_stacked([scorer.weights[n] for scorer in scorers]) for n in range(len(scorers[0].weights))]
        self.biases = [_stacked([scorer.biases[n] for scorer in scorers]) for n in range(len(scorers[0].biases))]
        self.output_weight = _stacked([scorer.output_weight for scorer in scorers])
        self.output_bias = _stacked([scorer.output_bias for scorer in scorers])
        self.dilation: int = scorers[0].dilation
        thresholds = [step.attention.new.controller.threshold for step in steps]
        self.threshold = None if thresholds[0] is None else torch.stack(thresholds)

    def __call__(self, moment: Moment) -> None:
        """Scores the token that this step completes, and takes its own into the scorers' histories."""
        retention_scores_step(
            torch.stack([step.keys for step in self.steps]).squeeze(2),
            torch.stack([step.values for step in self.steps]).squeeze(2),
            self.stacks["scorer_history"],
            self.stacks["scores"],
            moment.positions,
            self.weights,
            self.biases,
            self.output_weight,
            self.output_bias,
            dilation=self.dilation,
            window=self.config.window_tokens,
            threshold=self.threshold,
            score=self.config.score,
            steps_per_unit=SCORE_GRID,
        )


def scorings(steps: Sequence[Any], states: States) -> list[Scoring]:
    """One a configuration, of all steps of token eviction among these."""
    groups: dict[Any, list[TokenEvictionStep]] = {}
    for step in steps:
        if isinstance(step, TokenEvictionStep):
            groups.setdefault(step.attention.config, []).append(step)
    return [Scoring(group, states) for group in groups.values()]


def _stacked(parameters: Sequence[nn.Parameter]) -> Tensor:
    """[L, ...]: one parameter that all layers share is not repeated; others become views of the whole."""
    if len(parameters) > 1 and all(parameter is parameters[0] for parameter in parameters):
        return parameters[0].detach().expand(len(parameters), *parameters[0].shape)
    whole = torch.stack([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole, strict=True):
        parameter.data = part
    return whole
