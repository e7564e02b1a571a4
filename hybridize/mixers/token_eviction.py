"""Token eviction: a sliding window, sinks, and older tokens that a learned score retains (arXiv 2510.20787).

Query i sees key j <= i if i - j < W, or if j is retained: j is a sink, or its score is positive, and j is among the
best `budget_tokens` of those that have left i's window. A score r_j = sigmoid(x_j) - 1/2 (or max(x_j, 0)) comes from a
small CNN over the keys before RoPE and the values of the tokens j - m .. j + m. The decision is hard; in training r_j
gets the gradient of a gate on v_j.

What differs from the paper: the L1 loss reaches a little below the threshold, and its weight moves by small steps
(see `BudgetController`); the cap binds in training, prefill and decode alike, and by the same rule (there it is
left out of training, and prefill lets early queries see by the whole prompt's ranking); a score is computed once, as
soon as its right context is there, by a scorer that streams, instead of rescoring a de-rotated window now and then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.errors import RecipeError
from hybridize.mixers.base import Mixer, MixerState, Rope
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.documents import document_of_tokens, document_positions
from hybridize.mixers.parts.future_attention import future_attention, retention_target_loss
from hybridize.mixers.parts.retained_slots import completed, fill_retained
from hybridize.mixers.parts.retention_parts import RetentionParts
from hybridize.mixers.parts.slots import (
    entries_of,
    entry_columns,
    make_writable,
    real_tokens_first,
    ring_held,
    ring_positions,
    take,
)
from hybridize.mixers.parts.soft_retention import concrete_log_gates, soft_budget_loss, softly_retained_attention
from hybridize_kernels import RetentionDecision, retained_attention, retained_decode, retention_decision

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


class TokenEviction(Mixer):
    """Softmax attention over a window and at most `budget_tokens` retained older tokens per key head.

    The state holds, for each key head, a ring of W slots, `budget_tokens` slots for retained tokens, and the last
    inputs of the scorer's convolutions, from which it goes on with the next token.
    """

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
        unrotated = k
        q, k = rope(q, k)
        if state is not None:
            make_writable(state.tensors)
            if q.shape[1] == 1 and not torch.is_grad_enabled():
                return self._decode(q, k, v, unrotated, state, positions), {}
            return self._append(q, k, v, unrotated, state, positions), {}

        in_order = positions if self.padded else None
        logit = self._logits(unrotated, v, in_order, cu_seqlens)
        decision = self._decide(logit, in_order, cu_seqlens)
        everything = self.training and self._in_first_steps(self.config.warmup_steps)
        if self.training and self.config.score_gradient == "soft" and not everything:
            out = self._attend_softly(q, k, v, logit, in_order, cu_seqlens)
        else:
            out = self._attend(
                q,
                k,
                v,
                torch.ones_like(decision.decided) if everything else self._taught(decision.decided),
                in_order,
                in_order,
                budget=None if everything else self.budget_tokens,
                cu_seqlens=cu_seqlens,
            )
        if not self.training:
            return out, {}
        auxiliary = {"eviction_budget": self._observed(decision, logit)}
        if self.config.score_gradient == "soft":
            auxiliary = {"eviction_budget": soft_budget_loss(logit, self.budget_tokens)}
        if self.config.future_attention:
            target = self._future_attention(q, k, positions, cu_seqlens)
            auxiliary["retention_target"] = self.config.future_attention * self._target_loss(
                logit, target, positions, cu_seqlens
            )
        return out, auxiliary

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
        future = self._future_attention(*Rope(*position_embeddings)(q, k), positions, cu_seqlens)
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
    def _future_attention(self, q: Tensor, k: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """What tokens will be worth to queries beyond the window, [B, T, H]; -inf where a score is incomplete.

        q, k: after RoPE. positions: [B, T].
        """
        future = future_attention(
            q,
            k,
            window=self.config.window_tokens,
            positions=positions if self.padded else None,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
        )
        return future.masked_fill(~self._complete(positions, cu_seqlens)[..., None], -torch.inf)

    def _target_loss(self, logit: Tensor, future: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return retention_target_loss(
            logit,
            future,
            positions,
            sinks=self.config.sink_tokens,
            cu_seqlens=cu_seqlens,
            target=self.config.future_target,
        )

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        heads, head_size = self.geometry.num_key_heads, self.geometry.head_size
        budget = self.config.budget_tokens
        slots = self.config.window_tokens + budget
        history = self.config.scorer_history_width(head_size)
        return MixerState(
            {
                "keys": torch.zeros(batch, heads, slots, head_size, device=device, dtype=dtype),
                "values": torch.zeros(batch, heads, slots, head_size, device=device, dtype=dtype),
                "scores": torch.zeros(batch, heads, slots, device=device, dtype=torch.float32),
                "retained_positions": torch.full((batch, heads, budget), -1, device=device, dtype=torch.int32),
                "num_retained": torch.zeros(batch, heads, device=device, dtype=torch.int32),
                "scorer_history": torch.zeros(batch, heads, history, device=device, dtype=torch.float32),
                "last_position": torch.full((batch,), -1, device=device, dtype=torch.int32),
            },
            minus_one=("retained_positions", "last_position"),
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
        if cu_seqlens is None:
            last = positions.amax(1, keepdim=True)
        else:
            last = (cu_seqlens.diff() - 1)[document_of_tokens(cu_seqlens, positions.shape[1])]
        complete: Tensor = (positions >= 0) & (positions <= last - self.config.margin_tokens)
        return complete

    def _above_threshold(self, logit: Tensor) -> Tensor:
        """[..., H]: zero is where a token begins to be kept."""
        threshold = self.new.controller.threshold
        return logit if threshold is None else logit - threshold

    def _taught(self, score: Tensor) -> Tensor:
        """Scores as attention gets them, with or without a gradient."""
        return score.detach() if self.config.score_gradient == "none" else score

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

    # Attention and its state.

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        score: Tensor,
        query_positions: Tensor | None,
        key_positions: Tensor | None,
        *,
        budget: int | None,
        ordered_from: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        gradient = self.config.score_gradient
        # Only whole texts have the others, which copies of the code without the kernels lack; nobody else misses them.
        if not self.training or query_positions is not key_positions or gradient in ("soft", "none"):
            gradient = "straight_through"
        return retained_attention(
            q,
            k,
            v,
            score,
            window=self.config.window_tokens,
            sinks=self.config.sink_tokens,
            budget=budget,
            query_positions=query_positions,
            key_positions=key_positions,
            scale=self.scale,
            ordered_from=ordered_from,
            cu_seqlens=cu_seqlens,
            score_gradient=gradient,
        )

    def _attend_softly(
        self, q: Tensor, k: Tensor, v: Tensor, logit: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """In training, where the score is a gate. A token at the threshold is half there, as before its decision.

        Raises:
            RecipeError: rows are not single texts.
        """
        if positions is not None or cu_seqlens is not None:
            hint = "Set data.document_boundaries to false, or choose another gradient."
            raise RecipeError("A soft gate wants one text a row.", where="score_gradient", hint=hint)
        log_gate = concrete_log_gates(logit, self._temperature)
        return softly_retained_attention(
            q, k, v, log_gate, window=self.config.window_tokens, sinks=self.config.sink_tokens, scale=self.scale
        )

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, state: MixerState, positions: Tensor
    ) -> Tensor:
        num_new = (positions[:, 0] >= 0).to(torch.int32)
        before = state["last_position"] + 1
        logit = self.new.scorer.extend(unrotated, v, state["scorer_history"], num_new, before)
        return retained_decode(
            q,
            k,
            v,
            state["keys"],
            state["values"],
            state["last_position"],
            window=self.config.window_tokens,
            sinks=self.config.sink_tokens,
            positions=positions,
            scale=self.scale,
            scores=state["scores"],
            retained_positions=state["retained_positions"],
            num_retained=state["num_retained"],
            fresh_score=_on_grid(self._score(logit[:, 0])),
            margin=self.config.margin_tokens,
            workspace=state.workspace,
        )

    def _append(
        self, q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, state: MixerState, positions: Tensor
    ) -> Tensor:
        """Attends from T further tokens and takes them into the state."""
        new_positions = positions[..., None].expand(-1, -1, k.shape[2])
        # None: no padding; where it may lie between real tokens, the op has to look.
        order = real_tokens_first(positions) if self.padded else None
        if state.seen_tokens == 0:
            # Decided by the very numbers that decide where there is no state.
            in_order = None if order is None else positions
            score = self._decide(self._logits(unrotated, v, in_order).detach(), in_order).decided
            self._start_history(unrotated, v, state, positions, order)
            out = self._attend(q, k, v, score, in_order, in_order, budget=self.config.budget_tokens)
            self._store(state, {"keys": k, "values": v, "scores": score, "positions": new_positions}, positions, order)
            return out
        window, before = self.config.window_tokens, state["last_position"]
        # Retained tokens in order, after the empty slots.
        held, slots = state["retained_positions"].sort(dim=2)
        unscored = torch.zeros(new_positions.shape, device=k.device)
        entries = {
            name: entries_of(state[name], slots, before, window, new)
            for name, new in (("keys", k), ("values", v), ("scores", unscored))
        }
        in_ring = ring_positions(before, window)[..., None].expand(-1, -1, k.shape[2])
        entries["positions"] = torch.cat((held.transpose(1, 2), in_ring, new_positions), dim=1)
        num_new = (positions >= 0).sum(1)
        scored = (unrotated, v) if order is None else (take(unrotated, order), take(v, order))
        logit = self.new.scorer.extend(*scored, state["scorer_history"], num_new, before + 1)
        fresh = _on_grid(self._score(logit))
        first = before + 1 - self.config.margin_tokens
        entries["scores"] = completed(entries["scores"], entries["positions"], fresh, first, num_new)
        out = self._attend(
            q,
            entries["keys"],
            entries["values"],
            entries["scores"],
            positions,
            entries["positions"],
            budget=self.config.budget_tokens,
            ordered_from=self.config.budget_tokens if order is None else None,
        )
        self._store(state, entries, positions, order)
        return out

    @torch.no_grad()
    def _start_history(self, k: Tensor, v: Tensor, state: MixerState, positions: Tensor, order: Tensor | None) -> None:
        """Leaves the scorer where it is after a whole text [B, T, H, D]: its last 2 m tokens tell all of it."""
        num_tokens, num_real = positions.shape[1], (positions >= 0).sum(1)
        reach = min(2 * self.config.margin_tokens, num_tokens)
        if reach == 0:
            return
        skipped = (num_real - reach).clamp(min=0)
        if order is None:
            k, v = k[:, num_tokens - reach :], v[:, num_tokens - reach :]
        else:
            columns = order.gather(1, skipped[:, None] + torch.arange(reach, device=k.device))
            k, v = take(k, columns), take(v, columns)
        self.new.scorer.extend(k, v, state["scorer_history"], num_real - skipped, skipped)

    @torch.no_grad()
    def _store(self, state: MixerState, entries: dict[str, Tensor], positions: Tensor, order: Tensor | None) -> None:
        """Takes the entries into the state; their last T columns are new, at positions [B, T]."""
        window, before = self.config.window_tokens, state["last_position"]
        last = torch.maximum(before, positions.amax(1).to(torch.int32))
        fill_retained(state.tensors, entries, last, window=window, sinks=self.config.sink_tokens)
        num_entries = entries["keys"].shape[1]
        in_ring = entry_columns(ring_held(last, window), before, order, positions.shape[1], num_entries)
        for name in ("keys", "values", "scores"):
            state[name][:, :, :window] = take(entries[name], in_ring).transpose(1, 2)
        before.copy_(last)


def _on_grid(score: Tensor) -> Tensor:
    rounded = torch.round(score.detach() * SCORE_GRID) / SCORE_GRID
    return score + (rounded - score).detach() if score.requires_grad else rounded
