"""What a token is worth to token eviction, and how that is learnt: scores, decisions, budget, future attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridize.mixers.base import Mixer, Rope
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.documents import document_of_tokens, document_positions
from hybridize.mixers.parts.future_attention import future_attention, retention_target_loss
from hybridize.mixers.parts.influence import regressed_on_influence
from hybridize.mixers.parts.retention_parts import RetentionParts
from hybridize.mixers.parts.slots import real_tokens_first, take
from hybridize.mixers.parts.soft_top_k import soft_top_k
from hybridize_kernels import RetentionDecision, retention_decision

SCORE_GRID = 2.0**16
"""Scores are compared on a grid of this many steps a unit: tokens in equal surroundings tie exactly (the earlier one
wins), whatever the rounding of a matrix product does for one number of tokens or another."""
LEAST_TEMPERATURE = 0.1
"""Of a soft gate at the end of its schedule: between 0.01 and 0.99 lies then a tenth of what does at 1."""


@dataclass(frozen=True)
class RetentionTargets:
    """What a batch teaches the scorer; it stays the same while the projections are frozen.

    Attributes:
        keys, values: [B, T, H, D], what the scorer reads, the keys before RoPE. positions: [B, T].
        future: [B, T, H], see `future_attention`; -inf where the score is incomplete.
        cu_seqlens: [N + 1], the bounds of documents packed into one row, or None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    future: Tensor
    cu_seqlens: Tensor | None = None


class Taught(NamedTuple):
    """Scores in training, the gradient that attention gives them, and what stands for a regression among the losses.

    stand_in: a scalar 0, see `soft_top_k` and `regressed_on_influence`; None: the gradient is the loss's own.
    """

    score: Tensor
    gradient: str
    stand_in: Tensor | None = None


class RetentionMixer(Mixer):
    """A mixer whose new parameters are a scorer and the controller of its budget; it attends in a subclass."""

    config_class = TokenEvictionConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._budget_tokens: int = self.config.budget_tokens
        self._temperature = LEAST_TEMPERATURE

    def build_new(self) -> nn.Module:
        return RetentionParts(self.config, self.geometry)

    def initialise_new(self) -> None:
        self.new.scorer.initialise(self.config.scorer_bias_init)
        self.new.controller.initialise()

    def share(self, first: Mixer) -> None:
        """One scorer for the whole model; the controllers stay each layer's own."""
        self.new.scorer = first.new.scorer

    def schedule(self, progress: float, sequence_tokens: int) -> None:
        """The budget in training falls linearly from the sequence's length to its final value, a temperature from 1."""
        progress, final = min(progress, 1.0), self.config.budget_tokens
        self._budget_tokens = max(final, round(sequence_tokens + (final - sequence_tokens) * progress))
        self._temperature = 1.0 + (LEAST_TEMPERATURE - 1.0) * progress

    @property
    def budget_tokens(self) -> int:
        """The cap in force: the scheduled one in training, else the final one."""
        return self._budget_tokens if self.training else self.config.budget_tokens  # type: ignore[no-any-return]

    def schedule_key(self) -> tuple[int, float] | None:
        in_first_steps = self.config.warmup_steps or self.config.freeze_steps
        return None if in_first_steps else (self._budget_tokens, self._temperature)

    def after_step(self) -> None:
        self.new.controller.after_step(self._budget_tokens)

    def metrics(self) -> dict[str, Tensor | float]:
        return {**self.new.controller.metrics(), "budget_tokens": float(self._budget_tokens)}

    # Learning from the teacher's queries and keys alone.

    @torch.no_grad()
    def align_targets(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], cu_seqlens: Tensor | None = None
    ) -> RetentionTargets:
        """What a batch [B, T, hidden_size] without padding teaches, from projections that are the teacher's.

        cu_seqlens: [N + 1], the bounds of documents packed into one row, as in `mix`.
        """
        batch, num_tokens, _ = hidden_states.shape
        q, k, v = (
            project(hidden_states).view(batch, num_tokens, -1, self.geometry.head_size)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.normed(q, k, v)
        positions = torch.arange(num_tokens, device=q.device).expand(batch, -1)
        if cu_seqlens is not None:
            positions = document_positions(cu_seqlens, num_tokens)
        future = self._future_attention(*Rope(*position_embeddings)(q, k), positions, cu_seqlens, padded=False)
        return RetentionTargets(k, v, positions, future, cu_seqlens)

    def align_loss(self, targets: RetentionTargets) -> Tensor:
        """The scorer's regression loss, a scalar; sets `auxiliary` as a forward pass does.

        The error of the output is left out: beside this loss its gradient changed neither which tokens are retained
        nor the error that remains, and it costs a pass through the attention, forward and back.
        """
        bounds = targets.cu_seqlens
        logit = self._logits(targets.keys, targets.values, None, bounds)
        self.auxiliary = {"eviction_budget": self._observed(self._decide(logit, None, bounds), logit)}
        return self._target_loss(logit, targets.future, targets.positions, bounds)

    @torch.no_grad()
    def _future_attention(
        self, q: Tensor, k: Tensor, positions: Tensor, cu_seqlens: Tensor | None, *, padded: bool
    ) -> Tensor:
        """What tokens will be worth to queries beyond the window, [B, T, H]; -inf where a score is incomplete.

        q, k: after RoPE. positions: [B, T]; padded: some may be -1.
        """
        future = future_attention(
            q,
            k,
            window=self.config.window_tokens,
            positions=positions if padded else None,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
        )
        return future.masked_fill(~self._complete(positions, cu_seqlens)[..., None], -torch.inf)

    def _influence_loss(self, logit: Tensor, influence: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The scorer's regression on the logarithm of its tokens' influence [B, T, H], -inf where there is none."""
        known = influence.masked_fill(~self._complete(positions, cu_seqlens)[..., None], -torch.inf)
        loss = retention_target_loss(
            logit, known, positions, sinks=self.config.sink_tokens, cu_seqlens=cu_seqlens, target="logarithm"
        )
        weight: float = self.config.influence
        return weight * loss

    def _target_loss(self, logit: Tensor, future: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return retention_target_loss(
            logit,
            future,
            positions,
            sinks=self.config.sink_tokens,
            cu_seqlens=cu_seqlens,
            target=self.config.future_target,
        )

    # Scores.

    def _logits(self, k: Tensor, v: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
        """k before RoPE, v [B, T, H, D] -> [B, T, H]; positions [B, T] where there may be padding, else None."""
        if self.config.detach_scorer_input:
            k, v = k.detach(), v.detach()
        if positions is None:
            logit: Tensor = self.new.scorer(k, v, None, cu_seqlens)
        else:
            # Padding may lie between real tokens, as in a batch of conversations padded turn by turn.
            order = real_tokens_first(positions)
            real = take(positions, order) >= 0
            logit = take(self.new.scorer(take(k, order), take(v, order), real), order.argsort(dim=1))
        return logit.detach() if self.training and self._in_first_steps(self.config.freeze_steps) else logit

    def _complete(self, positions: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """[B, T] bool: a text's last m tokens lack right context; they are inside every window, without a score."""
        return (positions >= 0) & _followed_by(self.config.margin_tokens, positions, cu_seqlens)

    def _competing(self, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """[B, T, 1] bool: tokens that leave the window and are not sinks; what becomes of them their scores decide."""
        leaves = _followed_by(self.config.window_tokens, positions, cu_seqlens)
        competing: Tensor = leaves & (positions >= self.config.sink_tokens)
        return competing[..., None]

    def _above_threshold(self, logit: Tensor) -> Tensor:
        """[..., H]: zero is where a token begins to be kept."""
        threshold = self.new.controller.threshold
        return logit if threshold is None else logit - threshold

    def _taught(self, score: Tensor, logit: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Taught:
        """Scores as attention gets them in training."""
        wanted = self.config.score_gradient
        if self.config.influence:
            loss = partial(self._influence_loss, positions=positions, cu_seqlens=cu_seqlens)
            score, stand_in = regressed_on_influence(score, logit, loss)
            return Taught(score, "influence", stand_in)
        if wanted != "none" and self.config.score_relaxation == "top_k":
            score, stand_in = soft_top_k(
                score,
                self._above_threshold(logit),
                self._competing(positions, cu_seqlens),
                places=max(1, self.budget_tokens - self.config.sink_tokens),
                cu_seqlens=cu_seqlens,
            )
            return Taught(score, wanted, stand_in)
        return Taught(score.detach(), "straight_through") if wanted == "none" else Taught(score, wanted)

    def _score(self, logit: Tensor) -> Tensor:
        logit = self._above_threshold(logit)
        return torch.sigmoid(logit) - 0.5 if self.config.score == "sigmoid" else torch.relu(logit)

    def _in_first_steps(self, steps: int) -> bool:
        return steps > 0 and int(self.new.controller.steps) < steps

    def _decide(self, logit: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None = None) -> RetentionDecision:
        """What the logits [B, T, H] of whole texts decide; positions [B, T] where there may be padding, else None."""
        return retention_decision(
            self._above_threshold(logit),
            self.new.controller.l1_weight,
            score=self.config.score,
            steps_per_unit=SCORE_GRID,
            margin=self.config.margin_tokens,
            # A ReLU has no gradient below its threshold.
            l1_margin=self.config.l1_margin if self.config.score == "sigmoid" else 0.0,
            positions=positions,
            cu_seqlens=cu_seqlens,
            longer_than=self.config.window_tokens + self.config.budget_tokens,
        )

    def _observed(self, decision: RetentionDecision, logit: Tensor) -> Tensor:
        """The L1 loss of a micro-batch, which the controller of its weight takes note of."""
        self.new.controller.observe(decision.kept_share, decision.scored_tokens, logit)
        return decision.budget_loss


def _followed_by(tokens: int, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B, T] bool: the text goes on for so many tokens; for padding it means nothing."""
    if cu_seqlens is None:
        last = positions.amax(1, keepdim=True)
    else:
        last = (cu_seqlens.diff() - 1)[document_of_tokens(cu_seqlens, positions.shape[1])]
    followed: Tensor = positions <= last - tokens
    return followed


def on_grid(score: Tensor) -> Tensor:
    rounded = torch.round(score.detach() * SCORE_GRID) / SCORE_GRID
    return score + (rounded - score).detach() if score.requires_grad else rounded
