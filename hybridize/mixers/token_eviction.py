"""Token eviction: a sliding window, sinks, and older tokens that a learned score retains (arXiv 2510.20787).

Query i sees key j <= i if i - j < W, or if j is retained: j is a sink, or its score is positive, and j is among the
best `budget_tokens` of those that have left i's window. A score r_j = sigmoid(x_j) - 1/2 (or max(x_j, 0)) comes from a
small CNN over the keys before RoPE and the values of the tokens j - m .. j + m. The decision is hard; in training r_j
gets the gradient of a gate on v_j.

What differs from the paper: the cap binds in training, prefill and decode alike, and by the same rule (there it is
left out of training, and prefill lets early queries see by the whole prompt's ranking); a score is computed once, when
its right context is there, from the last 2 m tokens kept before RoPE, instead of rescoring a de-rotated window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.base import Mixer, MixerState, Rope
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.budget_controller import BudgetController
from hybridize.mixers.parts.future_attention import future_attention, retention_target_loss
from hybridize.mixers.parts.retained_slots import (
    SLOTS,
    best_ranked,
    completed,
    lowest_ranked,
    rank_entries,
    real_tokens_last,
)
from hybridize.mixers.parts.slots import put, take
from hybridize.mixers.parts.token_scorer import TokenScorer
from hybridize_kernels import retained_attention

SCORE_GRID = 2.0**16
"""Scores are compared on a grid of this many steps a unit: tokens in equal surroundings tie exactly (the earlier one
wins), whatever the rounding of a matrix product does for one number of tokens or another."""


class RetentionParts(nn.Module):
    """The scorer and the controller of its L1 weight."""

    def __init__(self, config: TokenEvictionConfig, geometry: AttentionGeometry) -> None:
        super().__init__()
        self.scorer = TokenScorer(
            config.scorer_widths(geometry.head_size),
            config.scorer_kernel,
            config.scorer_dilation,
            geometry.num_key_heads if config.scorer_sharing == "head" else 1,
            config.scorer_dropout,
        )
        self.controller = BudgetController(config, geometry.num_key_heads)


@dataclass(frozen=True)
class RetentionTargets:
    """What a batch teaches the scorer; it stays the same while the projections are frozen.

    Attributes:
        scored: [B, T, H, 2 D], what the scorer reads. positions: [B, T].
        future: [B, T, H], see `future_attention`; -inf where the score is incomplete.
        complete: [B, T] bool.
    """

    scored: Tensor
    positions: Tensor
    future: Tensor
    complete: Tensor


class TokenEviction(Mixer):
    """Softmax attention over a window and at most `budget_tokens` retained older tokens per key head.

    The state is one set of W + `budget_tokens` slots per key head, in no order: the window fills W of them, so what is
    left is the cap. A new token takes the slot of the lowest-ranked one.
    """

    config_class = TokenEvictionConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._budget_tokens: int = self.config.budget_tokens

    def build_new(self) -> nn.Module:
        return RetentionParts(self.config, self.geometry)

    def initialise_new(self) -> None:
        self.new.scorer.initialise(self.config.scorer_bias_init)
        self.new.controller.initialise()

    def share(self, first: Mixer) -> None:
        """One scorer for the whole model; the controllers stay each layer's own."""
        self.new.scorer = first.new.scorer

    def schedule(self, progress: float, sequence_tokens: int) -> None:
        """The budget in training falls linearly from the sequence's length to `budget_tokens`."""
        final = self.config.budget_tokens
        self._budget_tokens = max(final, round(sequence_tokens + (final - sequence_tokens) * min(progress, 1.0)))

    @property
    def budget_tokens(self) -> int:
        """The cap in force: the scheduled one in training, else the final one."""
        return self._budget_tokens if self.training else self.config.budget_tokens  # type: ignore[no-any-return]

    def after_step(self) -> None:
        self.new.controller.after_step(self._budget_tokens)

    def metrics(self) -> dict[str, float]:
        return {**self.new.controller.metrics(), "budget_tokens": float(self._budget_tokens)}

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
        scored = torch.cat((k, v), dim=-1)
        q, k = rope(q), rope(k)
        if state is not None:
            return self._continue(q, k, v, scored, state, positions), {}

        logit = self._logits(scored, positions) if self.training else self._logits_in_any_padding(scored, positions)
        score = self._score(logit)
        complete = self._complete(positions)
        decided = torch.where(complete[..., None], _on_grid(score), 0.0)
        everything = self.training and self._in_first_steps(self.config.warmup_steps)
        out = self._attend(
            q,
            k,
            v,
            torch.ones_like(decided) if everything else decided,
            positions,
            positions,
            budget=None if everything else self.budget_tokens,
        )
        if not self.training:
            return out, {}
        return out, {"eviction_budget": self._budget_loss(score, complete)}

    # Learning from the teacher's queries and keys alone.

    @torch.no_grad()
    def align_targets(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> RetentionTargets:
        """What a batch [B, T, hidden_size] without padding teaches, from projections that are the teacher's."""
        batch, num_tokens, _ = hidden_states.shape
        q, k, v = (
            project(hidden_states).view(batch, num_tokens, -1, self.geometry.head_size)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        positions = torch.arange(num_tokens, device=q.device).expand(batch, -1)
        complete = self._complete(positions)
        rope = Rope(*position_embeddings)
        future = future_attention(
            rope(q), rope(k), window=self.config.window_tokens, positions=positions, scale=self.scale
        )
        future = future.masked_fill(~complete[..., None], -torch.inf)
        return RetentionTargets(torch.cat((k, v), dim=-1), positions, future, complete)

    def align_loss(self, targets: RetentionTargets) -> Tensor:
        """The scorer's regression loss, a scalar; sets `auxiliary` as a forward pass does.

        The error of the output is left out: beside this loss its gradient changed neither which tokens are retained
        nor the error that remains, and it costs a pass through the attention, forward and back.
        """
        logit = self._logits(targets.scored, targets.positions)
        self.auxiliary = {"eviction_budget": self._budget_loss(self._score(logit), targets.complete)}
        return retention_target_loss(logit, targets.future, targets.positions, sinks=self.config.sink_tokens)

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        heads, head_size = self.geometry.num_key_heads, self.geometry.head_size
        slots = self.config.window_tokens + self.config.budget_tokens
        unscored = 2 * self.config.margin_tokens
        return MixerState(
            {
                "keys": torch.zeros(batch, slots, heads, head_size, device=device, dtype=dtype),
                "values": torch.zeros(batch, slots, heads, head_size, device=device, dtype=dtype),
                "scores": torch.zeros(batch, slots, heads, device=device, dtype=torch.float32),
                "positions": torch.full((batch, slots, heads), -1, device=device, dtype=torch.int32),
                "unscored": torch.zeros(batch, unscored, heads, 2 * head_size, device=device, dtype=dtype),
                "last_position": torch.full((batch,), -1, device=device, dtype=torch.int32),
            }
        )

    # Scores.

    def _logits(self, scored: Tensor, positions: Tensor) -> Tensor:
        """scored [B, T, H, 2 D], positions [B, T] -> [B, T, H]; padding must not lie between real tokens."""
        if self.config.detach_scorer_input:
            scored = scored.detach()
        logit: Tensor = self.new.scorer(scored, positions >= 0)
        return logit.detach() if self.training and self._in_first_steps(self.config.freeze_steps) else logit

    def _logits_in_any_padding(self, scored: Tensor, positions: Tensor) -> Tensor:
        """The same where padding lies between real tokens, as in a batch of conversations padded turn by turn."""
        order = real_tokens_last(positions)
        return take(self._logits(take(scored, order), take(positions, order)), order.argsort(dim=1))

    def _complete(self, positions: Tensor) -> Tensor:
        """[B, T] bool: the last m tokens of a row lack right context; they are inside every window, without a score."""
        complete: Tensor = (positions >= 0) & (positions <= positions.amax(1, keepdim=True) - self.config.margin_tokens)
        return complete

    def _score(self, logit: Tensor) -> Tensor:
        return torch.sigmoid(logit) - 0.5 if self.config.score == "sigmoid" else torch.relu(logit)

    def _in_first_steps(self, steps: int) -> bool:
        return steps > 0 and int(self.new.controller.steps) < steps

    def _budget_loss(self, score: Tensor, complete: Tensor) -> Tensor:
        """Mean of lambda max(r, 0) over rows, heads and the tokens with a complete score; the controller watches."""
        num_complete = complete.sum().clamp(min=1)
        kept = ((score > 0) & complete[..., None]).sum((0, 1)) / num_complete
        self.new.controller.observe(kept, max(score.shape[1] - self.config.margin_tokens, 0))
        positive = torch.where(complete[..., None], score.clamp(min=0), 0.0).sum((0, 1)) / num_complete
        loss: Tensor = (self.new.controller.l1_weight * positive).mean()
        return loss

    # Attention and its state.

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        score: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        *,
        budget: int | None,
    ) -> Tensor:
        return retained_attention(
            q,
            k,
            v,
            score,
            window=self.config.window_tokens,
            sinks=self.config.sink_tokens,
            budget=budget,
            query_positions=query_positions,
            key_positions=key_positions.long(),
            scale=self.scale,
        )

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, scored: Tensor, state: MixerState, positions: Tensor
    ) -> Tensor:
        """Attends from T further tokens and takes them into the state."""
        num_heads, window, sinks = k.shape[2], self.config.window_tokens, self.config.sink_tokens
        before = state["last_position"]
        last = torch.maximum(before, positions.amax(1).to(torch.int32))
        fresh = self._fresh_scores(state, scored, positions, last)
        new_positions = positions.to(torch.int32)[..., None].expand(-1, -1, num_heads)
        arrived = {
            "keys": k,
            "values": v,
            "scores": torch.zeros(new_positions.shape, device=k.device),
            "positions": new_positions,
        }
        one = q.shape[1] == 1 and not torch.is_grad_enabled()
        if one:
            # What the new token displaces is what its query does not see, so the state can be written first.
            state["scores"] = completed(state["scores"], state["positions"], fresh, before, last, self._margin)
            rank = rank_entries(state["scores"], state["positions"], last, window=window, sinks=sinks)
            slot = lowest_ranked(rank, state["positions"])
            for name in SLOTS:
                state[name] = put(state[name], slot, arrived[name], positions >= 0)
            entries = state.tensors
        else:
            if state.seen_tokens == 0:
                entries = arrived
            else:
                entries = {name: torch.cat((state[name], arrived[name]), dim=1) for name in SLOTS}
            entries["scores"] = completed(entries["scores"], entries["positions"], fresh, before, last, self._margin)
        out = self._attend(
            q,
            entries["keys"],
            entries["values"],
            entries["scores"],
            positions,
            entries["positions"],
            budget=None if one else self.config.budget_tokens,  # the state holds no more than that
        )
        if not one:
            rank = rank_entries(entries["scores"], entries["positions"], last, window=window, sinks=sinks)
            state.tensors.update(best_ranked(entries, rank, state["positions"].shape[1]))
        state["last_position"] = last
        return out

    @property
    def _margin(self) -> int:
        return self.config.margin_tokens  # type: ignore[no-any-return]

    def _fresh_scores(self, state: MixerState, scored: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """Scores of the last 2 m stored tokens and the new ones, [B, 2 m + T, H]; the last column is position `last`.

        Of these, the positions from m before the old last one to m before the new last one are final now. The last 2 m
        tokens are stored for the next call.
        """
        stored = 2 * self._margin
        steps_back = torch.arange(stored - 1, -1, -1, device=positions.device)
        stored_positions = (state["last_position"].long()[:, None] - steps_back).clamp(min=-1)
        x = torch.cat((state["unscored"], scored), dim=1)
        x_positions = torch.cat((stored_positions, positions), dim=1)
        # Real tokens side by side at the right, whatever padding came with this call or an earlier one.
        order = real_tokens_last(x_positions)
        x, x_positions = take(x, order), take(x_positions, order)
        state["unscored"] = x[:, x.shape[1] - stored :].detach().clone()  # a view would hold the whole prompt
        return _on_grid(self._score(self._logits(x, x_positions))).detach()


def _on_grid(score: Tensor) -> Tensor:
    return score + (torch.round(score * SCORE_GRID) / SCORE_GRID - score).detach()
