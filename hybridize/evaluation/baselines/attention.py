"""Attention over a window and older tokens that a training-free policy retains, in one causal meaning.

Text is read in blocks of E positions. Before the block that starts at p, the tokens that leave the window within it
(position <= p + E − 1 − W) compete with those that are retained for C slots: sinks first, then what is worth more, of
equals the earlier; what they are worth follows from queries before p alone. A query of the block sees its last W
tokens, itself included, and the retained ones. E = 1 is the streaming algorithm of each paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridize.errors import UsageError
from hybridize.evaluation.baselines.config import PolicyConfig
from hybridize.evaluation.baselines.policies import fixed_worth, num_queries, smoothed
from hybridize.evaluation.baselines.state import PolicyState
from hybridize.mixers.base import Mixer, MixerState, Rope
from hybridize.mixers.parts.slots import make_writable
from hybridize_kernels import retained_attention


class PolicyAttention(Mixer):
    """See the module. It is no mixer to convert to, so it is not in the registry; it takes no padding."""

    config_class = PolicyConfig

    def forward(self, hidden_states: Tensor, *args: Any, token_positions: Tensor | None = None, **kwargs: Any) -> Any:
        # Not `attention_mask`: some attention implementations get one that says no more than what is causal.
        padded = token_positions is not None and bool((token_positions < 0).any())
        if padded or kwargs.get("cu_seqlens") is not None:
            raise UsageError(
                "training-free eviction reads one text a row, without padding.",
                hint="Give prompts of equal length.",
            )
        return super().forward(hidden_states, *args, **kwargs)

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
        begins = state is None or state.seen_tokens == 0
        if state is None:
            state = self.new_state(q.shape[0], q.device, k.dtype)
        assert isinstance(state, PolicyState)
        make_writable(state.tensors)
        start = state.seen_tokens
        places = torch.arange(start, start + q.shape[1], device=q.device)
        worth = self._first_worth(unrotated, places)
        if begins and not self.config.dynamic:
            return self._whole(q, k, v, worth, state), {}
        return self._blocks(q, k, v, worth, state, start), {}

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> PolicyState:
        sizes = self.geometry
        like = torch.empty(0, device=device, dtype=dtype)
        return PolicyState(batch, sizes.num_key_heads, sizes.num_query_heads, sizes.head_size, like)

    def _first_worth(self, k: Tensor, positions: Tensor) -> Tensor:
        """[B, T, H], what tokens are worth when they are read; attention gives the rest."""
        if self.config.dynamic:
            return k.new_zeros(k.shape[:3], dtype=torch.float32)
        return fixed_worth(self.config.policy, k, positions, layer=self.layer_idx, seed=self.config.seed)

    # Policies whose scores never change are what the op of token eviction computes.

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, worth: Tensor, state: PolicyState) -> Tensor:
        """Reads a text from its beginning in one pass, and leaves the state where the blocks would."""
        config = self.config
        score = None if config.policy == "recency" else worth
        out = retained_attention(
            q, k, v, score, window=config.window, sinks=config.sink_tokens, budget=config.budget, scale=self.scale
        )
        k, v, worth = k.transpose(1, 2), v.transpose(1, 2), worth.transpose(1, 2)
        state.append(k, v, worth)
        self._choose(state, k.shape[2], k.shape[2])  # as before the next token
        return out

    # Policies that go by attention.

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, worth: Tensor, state: PolicyState, start: int) -> Tensor:
        """q [B, T, HQ, D], k, v [B, T, H, D] at positions start, start + 1, ..."""
        step, end = self.config.step, start + q.shape[1]
        k, v, worth = k.transpose(1, 2), v.transpose(1, 2), worth.transpose(1, 2)  # [B, H, T, ...]
        outputs = []
        first = start
        while first < end:
            after = min(end, (first // step + 1) * step)
            span = slice(first - start, after - start)
            if first % step == 0:
                self._choose(state, first, first + step - 1)
            state.append(k[:, :, span], v[:, :, span], worth[:, :, span])
            outputs.append(self._attend(q[:, span], state, after))
            first = after
        return torch.cat(outputs, dim=1)

    def _attend(self, q: Tensor, state: PolicyState, end: int) -> Tensor:
        """The queries [B, n, HQ, D] of the last n tokens that were read."""
        probability = self._probability(q, state, end)
        if self.config.policy == "accumulated_attention":
            received = probability.sum((2, 3))  # [B, H, S]
            kept = state.num_kept
            state["kept_worth"] = state["kept_worth"] + received[:, :, :kept]
            state["near_worth"] = state["near_worth"] + received[:, :, kept:]
        remembered = num_queries(self.config.policy)
        if remembered:
            latest = q[:, -remembered:]
            state["last_queries"] = torch.cat((state["last_queries"], latest), dim=1)[:, -remembered:]
        values = state.held("values")[:, :, None]  # [B, H, 1, S, D]
        out = probability.to(values.dtype) @ values  # [B, H, G, n, D]
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _probability(self, q: Tensor, state: PolicyState, end: int) -> Tensor:
        """fp32 [B, H, G, n, S] of the last n queries over what is held; retained tokens come first."""
        keys = state.held("keys")
        heads = keys.shape[1]
        grouped = q.reshape(*q.shape[:2], heads, q.shape[2] // heads, q.shape[3]).permute(0, 2, 3, 1, 4)
        # In fp32, as kernels add up: logits rounded to bf16 would hold these policies back against the others.
        logits = self.scale * (grouped.float() @ keys[:, :, None].transpose(-1, -2).float())
        query = torch.arange(end - q.shape[1], end, device=q.device)[:, None]
        distance = query - state.positions(end)[:, :, None]  # [B, H, n, S]
        outside = distance >= self.config.window
        # A token that was chosen while it still is in a window stands in both parts; each sees it once.
        is_kept = torch.arange(keys.shape[2], device=q.device) < state.num_kept
        seen = (distance >= 0) & (outside == is_kept)
        probability: Tensor = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
        return probability

    def _choose(self, state: PolicyState, end: int, last: int) -> None:
        """Chooses who stays when `end` tokens have been read and the next choice comes after position `last`."""
        leaving = min(end, last + 1 - self.config.window)  # positions below it leave the window until then
        fresh = range(state.chosen_below, leaving)
        if fresh:
            first = end - state.num_near
            columns = torch.cat(
                (
                    torch.arange(state.num_kept, device=state["near_worth"].device),
                    torch.arange(fresh.start, fresh.stop, device=state["near_worth"].device) + state.num_kept - first,
                )
            )
            self._keep_best(state, end, self._worth(state, end), columns)
            state.chosen_below = leaving
            # What chosen tokens receive from now on while they are still in a window is added at the next choice.
            if self.config.dynamic:
                state["near_worth"] = state["near_worth"].clone()
                state["near_worth"][:, :, : leaving - first] = 0.0
        # The queries that will be asked need their own windows.
        state.forget_before(end - self.config.window + 1 - num_queries(self.config.policy), end)

    def _worth(self, state: PolicyState, end: int) -> Tensor:
        """[B, H, S] of what is held; a chosen token that still stands among the recent ones has both parts of its."""
        if not self.config.dynamic:
            return state.held("worth")
        if num_queries(self.config.policy):
            worth = self._probability(state["last_queries"], state, end).mean((2, 3))
        else:
            worth = state.held("worth")
        kept, near = worth[:, :, : state.num_kept], worth[:, :, state.num_kept :]
        place = state["kept_positions"] - (end - state.num_near)
        within = near.gather(2, place.clamp(min=0)).masked_fill(place < 0, 0.0) if state.num_near else 0.0
        return torch.cat((kept + within, near), dim=2)

    def _keep_best(self, state: PolicyState, end: int, worth: Tensor, columns: Tensor) -> None:
        """Of the held tokens in these columns, in order of position, the best stay."""
        positions, worth = state.positions(end)[:, :, columns], worth[:, :, columns]
        sinks = positions < self.config.sink_tokens
        rank = torch.where(sinks, torch.inf, smoothed(self.config.policy, worth, positions))
        best = rank.argsort(dim=2, descending=True, stable=True)[:, :, : self.config.budget].sort(dim=2).values
        chosen = columns[best]  # [B, H, n]
        for name in ("keys", "values"):
            held = state.held(name)
            state[f"kept_{name}"] = held.gather(2, chosen[..., None].expand(-1, -1, -1, held.shape[-1]))
        state["kept_worth"] = worth.gather(2, best)
        state["kept_positions"] = positions.gather(2, best)
