"""Token eviction: a sliding window, sinks, and older tokens that a learned score retains (arXiv 2510.20787).

Query i sees key j <= i if i - j < W, or if j is retained: j is a sink, or its score is positive, and j is among the
best `budget_tokens` of those that have left i's window. A score r_j = sigmoid(x_j) - 1/2 (or max(x_j, 0)) comes from a
small CNN over the keys before RoPE and the values of the tokens j - m .. j + m. The decision is hard; in training r_j
gets a gradient in one of several ways (`score_gradient`).

What differs from the paper, unless asked for: scores learn by the gradient of a soft top-k and from the attention that
tokens get (see `soft_top_k`, `future_attention`), without an L1 loss. Where there is one, it reaches a little below the
threshold, and its weight moves by small steps (see `BudgetController`). Always: the cap binds in training, prefill and
decode alike, and by the same rule (there it is left out of training, and prefill lets early queries see by the whole
prompt's ranking); a score is computed once, as soon as its right context is there, by a scorer that streams, instead of
rescoring a de-rotated window now and then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridize.errors import RecipeError
from hybridize.mixers.base import MixerState, Rope
from hybridize.mixers.parts.retained_slots import completed, fill_retained
from hybridize.mixers.parts.retention_mixer import RetentionMixer, Taught, on_grid
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
from hybridize_kernels import retained_attention, retained_decode


class TokenEviction(RetentionMixer):
    """Softmax attention over a window and at most `budget_tokens` retained older tokens per key head.

    The state holds, for each key head, a ring of W slots, `budget_tokens` slots for retained tokens, and the last
    inputs of the scorer's convolutions, from which it goes on with the next token.
    """

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
        taught = Taught(decision.decided, "straight_through")
        everything = self.training and self._in_first_steps(self.config.warmup_steps)
        if everything:
            kept = torch.ones_like(decision.decided)
            out = self._attend(q, k, v, kept, in_order, in_order, budget=None, cu_seqlens=cu_seqlens)
        elif self.training and self.config.score_gradient == "soft":
            out = self._attend_softly(q, k, v, logit, in_order, cu_seqlens)
        else:
            if self.training:
                taught = self._taught(decision.decided, logit, positions, cu_seqlens)
            out = self._attend(
                q,
                k,
                v,
                taught.score,
                in_order,
                in_order,
                budget=self.budget_tokens,
                cu_seqlens=cu_seqlens,
                score_gradient=taught.gradient,
            )
        if not self.training:
            return out, {}
        budget_loss = self._observed(decision, logit)
        if self.config.score_gradient == "soft":
            budget_loss = soft_budget_loss(logit, self.budget_tokens)
        elif taught.stand_in is not None:
            budget_loss = budget_loss + taught.stand_in
        auxiliary = {"eviction_budget": budget_loss}
        if self.config.future_attention:
            target = self._future_attention(q, k, positions, cu_seqlens, padded=self.padded)
            auxiliary["retention_target"] = self.config.future_attention * self._target_loss(
                logit, target, positions, cu_seqlens
            )
        return out, auxiliary

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
        score_gradient: Any = "straight_through",
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
            key_positions=key_positions,
            scale=self.scale,
            ordered_from=ordered_from,
            cu_seqlens=cu_seqlens,
            score_gradient=score_gradient,
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
            fresh_score=on_grid(self._score(logit[:, 0])),
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
        fresh = on_grid(self._score(logit))
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
