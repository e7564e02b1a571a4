"""Sliding window, sinks, and a learned choice of the older tokens that stay."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.configs.base import MixerConfig

POSITION_BYTES = 4
SCORE_BYTES = 4
COUNT_BYTES = 4
ScoreGradient = Literal["straight_through", "outside", "logit", "counterfactual", "soft", "none"]
ScoreRelaxation = Literal["gate", "top_k"]
FutureTarget = Literal["logarithm", "probability"]
BudgetControl = Literal["cap", "l1", "threshold"]


@dataclass(frozen=True)
class TokenEvictionConfig(MixerConfig):
    """Keys of the mixer `token_eviction` (arXiv 2510.20787).

    Attributes:
        window_tokens: W, tokens that a query sees, itself included, whatever their score.
        sink_tokens: first tokens of the text; they are retained by definition.
        budget_tokens: most tokens that stay after they have left the window, sinks included, per key head.
        scorer_sharing: a scorer for each key "head", one for a "layer", or one for the whole "model".
        score: "sigmoid" (sigmoid(x) - 0.5) or "relu" of the scorer's output x; a token is kept where it is positive.
        scorer_kernel, scorer_dilation, scorer_layers: of the convolutions; the score of a token depends on
            `margin_tokens` neighbours on either side.
        scorer_dropout: before each convolution, in training.
        scorer_bias_init: first value of the last bias; above zero everything is kept at the start.
        detach_scorer_input: the scorer's gradient does not reach keys and values.
        score_gradient: what a score learns from the model's loss. "straight_through" (the paper's): the gradient of a
            gate on its token's value, from every query that sees the token. "outside": the same, from queries whose
            window the token has left. "logit": from these, of a gate on the weight in their softmax.
            "counterfactual": the same, and for tokens that are not retained what showing them would change. "soft": in
            training tokens are weakened instead of evicted, by gates that harden as the budget falls. "none": nothing.
        score_relaxation: what stands for the hard decision in the backward pass. "gate" (the paper's): each score by
            itself. "top_k": the soft choice of the best, in which one token's gain is others' loss; the gradient of
            each text and head has the same size. With another gradient than "soft" and "none".
        future_attention: weight, in stages that train the whole model, of the loss by which scores are regressed on the
            student's own attention to tokens that have left the window; `align` learns from the teacher's alone. None
            costs perplexity, 0.2 recall (README, "What eviction learns from").
        future_target: of that attention, in `align` too, its mean "logarithm" or its mean "probability".
        influence: weight, in these stages, of the loss by which scores are regressed on the largest change in the
            model's loss that showing or hiding their token makes by one query; score_gradient must then be "none".
        warmup_steps: optimiser steps in training during which everything is kept.
        freeze_steps: optimiser steps during which the scorer is not trained.
        budget_control: how many tokens get a positive score; whatever their number, only the best `budget_tokens` are
            retained. "cap": nothing more, the scores rank. "l1" (the paper's): a loss pushes scores down, with a weight
            (lambda) that follows the number. "threshold": what a logit has to exceed follows it, and it settles at
            `budget_tokens` a training sequence without a loss.
        l1_sharing: one L1 weight (lambda) per key head, or per layer.
        l1_margin: the L1 loss is on max(r + margin, 0): tokens that are pushed out come to rest that far below the
            threshold. With "sigmoid" only; 0 is the paper's.
        l1_target_low, l1_target_high: lambda grows while more than high x budget tokens of a training sequence are
            kept, shrinks while fewer than low x budget are, and holds between. The paper's are 0.95 and 1.
        l1_increase, l1_decrease: factor and divisor of lambda over l1_every_steps, while twice the upper bound or more,
            or half the lower or less, is kept; nearer to them it moves less.
        l1_init, l1_min, l1_max: its first value and its range; below l1_min it is zero.
        l1_every_steps: optimiser steps over which such a change spreads.
        l1_initial_steps: optimiser steps after which lambda begins, at the next multiple of l1_every_steps.
    """

    name = "token_eviction"
    summary = "sliding window and sinks, and a small CNN that chooses which older tokens stay; fixed-size state"

    window_tokens: int = 256
    sink_tokens: int = 4
    budget_tokens: int = 256
    scorer_sharing: Literal["head", "layer", "model"] = "head"
    score: Literal["sigmoid", "relu"] = "sigmoid"
    scorer_kernel: int = 3
    scorer_dilation: int = 2
    scorer_layers: int = 3
    scorer_dropout: float = 0.1
    scorer_bias_init: float = 0.5
    detach_scorer_input: bool = True
    score_gradient: ScoreGradient = "counterfactual"
    score_relaxation: ScoreRelaxation = "top_k"
    future_attention: float = 0.03
    future_target: FutureTarget = "logarithm"
    influence: float = 0.0
    warmup_steps: int = 0
    freeze_steps: int = 0
    budget_control: BudgetControl = "cap"
    l1_sharing: Literal["head", "layer"] = "head"
    l1_margin: float = 0.1
    l1_target_low: float = 0.98
    l1_target_high: float = 1.02
    l1_increase: float = 1.5
    l1_decrease: float = 2.0
    l1_init: float = 1e-9
    l1_min: float = 1e-9
    l1_max: float = 1.0
    l1_every_steps: int = 32
    l1_initial_steps: int = 0

    @property
    def shared_over_layers(self) -> Hashable | None:
        if self.scorer_sharing != "model":
            return None
        return (self.score, self.scorer_kernel, self.scorer_dilation, self.scorer_layers, self.scorer_dropout)

    def __post_init__(self) -> None:
        for key in ("scorer_kernel", "scorer_dilation", "scorer_layers", "l1_every_steps"):
            self.require(getattr(self, key) >= 1, key, f"must be at least 1, is {getattr(self, key)}.")
        for key in ("sink_tokens", "warmup_steps", "freeze_steps", "l1_initial_steps"):
            self.require(getattr(self, key) >= 0, key, f"must be zero or positive, is {getattr(self, key)}.")
        self.require(self.scorer_kernel % 2 == 1, "scorer_kernel", f"must be odd, is {self.scorer_kernel}.")
        self.require(
            self.window_tokens > self.margin_tokens,
            "window_tokens",
            f"must exceed {self.margin_tokens}, the later tokens that a score waits for, is {self.window_tokens}.",
        )
        least = max(1, self.sink_tokens)
        self.require(
            self.budget_tokens >= least,
            "budget_tokens",
            f"must be at least {least} (it includes the sinks), is {self.budget_tokens}.",
        )
        self.require(0 <= self.scorer_dropout < 1, "scorer_dropout", f"must be in 0..1, is {self.scorer_dropout}.")
        self.require(math.isfinite(self.scorer_bias_init), "scorer_bias_init", "must be finite.")
        for key in ("future_attention", "influence"):
            weight = getattr(self, key)
            self.require(0 <= weight < math.inf, key, f"must be zero or positive, is {weight}.")
        self._require_choice("scorer_sharing", ("head", "layer", "model"))
        self._require_choice("score", ("sigmoid", "relu"))
        self._require_choice("score_gradient", get_args(ScoreGradient))
        self._require_choice("score_relaxation", get_args(ScoreRelaxation))
        self._require_choice("future_target", get_args(FutureTarget))
        self.require(
            self.score_gradient != "soft" or self.budget_control != "threshold",
            "budget_control",
            "threshold is for decisions; a soft gate has a loss of its own that holds the budget. Leave it out.",
        )
        self.require(
            not self.influence or self.score_gradient == "none",
            "score_gradient",
            f"must be none beside influence, which takes its place, is {self.score_gradient!r}.",
        )
        self._require_choice("budget_control", get_args(BudgetControl))
        self._require_choice("l1_sharing", ("head", "layer"))
        self.require(0 <= self.l1_margin < 0.5, "l1_margin", f"must be in 0..0.5, is {self.l1_margin}.")
        self.require(
            0 < self.l1_target_low <= self.l1_target_high < math.inf,
            "l1_target_low",
            f"needs 0 < low <= high, is {self.l1_target_low} and {self.l1_target_high}.",
        )
        for key in ("l1_increase", "l1_decrease"):
            value = getattr(self, key)
            self.require(1 <= value < math.inf, key, f"must be at least 1, is {value}.")
        self.require(0 < self.l1_min < math.inf, "l1_min", f"must be positive, is {self.l1_min}.")
        for key in ("l1_init", "l1_max"):
            value = getattr(self, key)
            self.require(self.l1_min <= value < math.inf, key, f"must be at least l1_min ({self.l1_min}), is {value}.")

    def _require_choice(self, key: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, key)
        self.require(value in choices, key, f"must be one of {', '.join(choices)}, is {value!r}.")

    @property
    def margin_tokens(self) -> int:
        """m: the score of token j depends on the tokens j - m .. j + m."""
        return self.scorer_layers * self.scorer_dilation * (self.scorer_kernel - 1) // 2

    def scorer_widths(self, head_size: int) -> tuple[int, ...]:
        """Channels from the scorer's input (key and value side by side) to the last convolution; halved by each."""
        return tuple(max(1, (2 * head_size) >> layer) for layer in range(self.scorer_layers + 1))

    def scorer_parameters(self, head_size: int) -> int:
        """Parameters of one scorer: 7.875 D² + 2 D + 1 with three layers of kernel 3."""
        widths = self.scorer_widths(head_size)
        convolutions = sum((a * self.scorer_kernel + 1) * b for a, b in pairwise(widths))
        return convolutions + widths[-1] + 1

    def misfits(self, geometry: AttentionGeometry, layer_index: int) -> list[str]:
        if (2 * geometry.head_size) >> self.scorer_layers < 1:
            return [f"{self.scorer_layers} scorer layers halve the {2 * geometry.head_size} channels below one."]
        return []

    def warnings(self, geometry: AttentionGeometry, context: int) -> list[str]:
        if context <= self.window_tokens + self.budget_tokens:
            return [
                f"{self.name}: window and budget ({self.window_tokens} + {self.budget_tokens} tokens) hold the whole "
                f"context of {context}; the cap never binds."
            ]
        return []

    def scorer_history_width(self, head_size: int) -> int:
        """Float32 numbers a key head that decoding keeps for the scorer: the last inputs of each convolution."""
        return (self.scorer_kernel - 1) * self.scorer_dilation * sum(self.scorer_widths(head_size)[:-1])

    def state_bytes(self, geometry: AttentionGeometry, context: int, element_bytes: int) -> int:
        slots = self.window_tokens + self.budget_tokens
        slot_bytes = slots * (2 * geometry.head_size * element_bytes + SCORE_BYTES)
        retained_bytes = self.budget_tokens * POSITION_BYTES + COUNT_BYTES
        history_bytes = self.scorer_history_width(geometry.head_size) * SCORE_BYTES
        last_position_bytes = POSITION_BYTES
        return geometry.num_key_heads * (slot_bytes + retained_bytes + history_bytes) + last_position_bytes

    def new_parameters(self, geometry: AttentionGeometry) -> int:
        """Of one layer; with scorer_sharing "model" the same parameters serve every layer."""
        scorers = geometry.num_key_heads if self.scorer_sharing == "head" else 1
        return scorers * self.scorer_parameters(geometry.head_size)
