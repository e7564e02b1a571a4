"""Sliding-window attention with sinks: o_i = softmax over the last W tokens and the first few of the text.

Sinks: arXiv 2309.17453. Keys are rotated at their true positions and stay so, also when text between them is forgotten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize.mixers.base import Mixer, MixerState, Rope
from hybridize.mixers.configs.sliding_window import SlidingWindowConfig
from hybridize.mixers.parts.slots import put, take
from hybridize_kernels import retained_attention


class SlidingWindow(Mixer):
    """Softmax attention of each query over its last `window_tokens` tokens and the first `sink_tokens`.

    The state holds a slot for each sink and a ring of W slots in which position p takes slot p mod W.
    """

    config_class = SlidingWindowConfig

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
        q, k = rope(q), rope(k)
        if state is None:
            return self._attend(q, k, v, positions, positions), {}
        if q.shape[1] == 1 and not torch.is_grad_enabled():
            # The token that the new one displaces has just left its window, so the state can be written first.
            self._write_one(state, k, v, positions)
            return self._attend(q, state["keys"], state["values"], positions, state["positions"]), {}
        if state.seen_tokens == 0:
            out = self._attend(q, k, v, positions, positions)
        else:
            keys = torch.cat((state["keys"], k), dim=1)
            values = torch.cat((state["values"], v), dim=1)
            key_positions = torch.cat((state["positions"], positions.to(torch.int32)), dim=1)
            out = self._attend(q, keys, values, positions, key_positions)
        self._write(state, k.detach(), v.detach(), positions)
        return out, {}

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        heads, head_size = self.geometry.num_key_heads, self.geometry.head_size
        slots = self.config.sink_tokens + self.config.window_tokens
        return MixerState(
            {
                "keys": torch.zeros(batch, slots, heads, head_size, device=device, dtype=dtype),
                "values": torch.zeros(batch, slots, heads, head_size, device=device, dtype=dtype),
                "positions": torch.full((batch, slots), -1, device=device, dtype=torch.int32),
                "last_position": torch.full((batch,), -1, device=device, dtype=torch.int32),
            }
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return retained_attention(
            q,
            k,
            v,
            window=self.config.window_tokens,
            sinks=self.config.sink_tokens,
            query_positions=query_positions,
            key_positions=key_positions.long(),
            scale=self.scale,
        )

    def _slot(self, positions: Tensor) -> Tensor:
        sinks = self.config.sink_tokens
        slot = torch.where(positions < sinks, positions, sinks + positions % self.config.window_tokens)
        return slot.clamp(min=0).long()

    def _write_one(self, state: MixerState, k: Tensor, v: Tensor, positions: Tensor) -> None:
        slot, valid = self._slot(positions), positions >= 0
        for name, value in (("keys", k), ("values", v), ("positions", positions)):
            state[name] = put(state[name], slot, value, valid)
        state["last_position"] = torch.maximum(state["last_position"], positions[:, 0].to(torch.int32))

    def _write(self, state: MixerState, k: Tensor, v: Tensor, positions: Tensor) -> None:
        batch, num_tokens = positions.shape
        num_slots = state["positions"].shape[1]
        last = torch.maximum(state["last_position"], positions.amax(1).to(torch.int32))
        in_window = positions > (last - self.config.window_tokens)[:, None]
        stays = (positions >= 0) & (in_window | (positions < self.config.sink_tokens))
        # For every slot the new column that fills it, or -1. Tokens that do not stay share one slot past the end.
        target = torch.where(stays, self._slot(positions), num_slots)
        source = torch.full((batch, num_slots + 1), -1, device=positions.device)
        columns = torch.arange(num_tokens, device=positions.device).expand(batch, -1)
        source = source.scatter(1, target, columns)[:, :-1]
        for name, value in (("keys", k), ("values", v), ("positions", positions.to(torch.int32))):
            filled = (source >= 0).view(*source.shape, *(1,) * (value.ndim - 2))
            state[name] = torch.where(filled, take(value, source.clamp(min=0)), state[name])
        state["last_position"] = last
