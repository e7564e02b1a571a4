"""Sliding-window attention with sinks: o_i = softmax over the last W tokens and the first few of the text.

Sinks: arXiv 2309.17453. Keys are rotated at their true positions and stay so, also when text between them is forgotten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize.mixers.base import Mixer, MixerState, Rope
from hybridize.mixers.configs.sliding_window import SlidingWindowConfig
from hybridize.mixers.parts.slots import (
    entries_of,
    entry_columns,
    make_writable,
    real_tokens_first,
    ring_held,
    ring_positions,
    take,
)
from hybridize_kernels import retained_attention, retained_decode


class SlidingWindow(Mixer):
    """Softmax attention of each query over its last `window_tokens` tokens and the first `sink_tokens`.

    The state holds, for each key head, a ring of W slots in which position p takes slot p mod W, and a slot for each
    sink, which moves there from the ring. What lies where follows from the last position.
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
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k = rope(q, k)
        if state is None:
            in_order = positions if self.padded else None
            return self._attend(q, k, v, in_order, in_order, cu_seqlens=cu_seqlens), {}
        make_writable(state.tensors)
        if q.shape[1] == 1 and not torch.is_grad_enabled():
            return self._decode(q, k, v, state, positions), {}
        return self._append(q, k, v, state, positions), {}

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        slots = self.config.window_tokens + self.config.sink_tokens
        shape = (batch, self.geometry.num_key_heads, slots, self.geometry.head_size)
        return MixerState(
            {
                "keys": torch.zeros(shape, device=device, dtype=dtype),
                "values": torch.zeros(shape, device=device, dtype=dtype),
                "last_position": torch.full((batch,), -1, device=device, dtype=torch.int32),
            },
            minus_one=("last_position",),
        )

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_positions: Tensor | None,
        key_positions: Tensor | None,
        ordered_from: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        return retained_attention(
            q,
            k,
            v,
            window=self.config.window_tokens,
            sinks=self.config.sink_tokens,
            query_positions=query_positions,
            key_positions=key_positions,
            scale=self.scale,
            ordered_from=ordered_from,
            cu_seqlens=cu_seqlens,
        )

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, state: MixerState, positions: Tensor) -> Tensor:
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
            workspace=state.workspace,
        )

    def _append(self, q: Tensor, k: Tensor, v: Tensor, state: MixerState, positions: Tensor) -> Tensor:
        """Attends from T further tokens and takes them into the state."""
        if state.seen_tokens == 0:
            in_order = positions if self.padded else None
            out = self._attend(q, k, v, in_order, in_order)
            self._store(state, k, v, positions)
            return out
        window, sinks, before = self.config.window_tokens, self.config.sink_tokens, state["last_position"]
        # Sinks that have left the ring, in order, after the empty slots.
        num_left = (before.long() + 1 - window).clamp(0, sinks)[:, None]
        order = torch.arange(sinks, device=before.device) - (sinks - num_left)  # [B, sinks]; below 0: empty
        slots = order.clamp(min=0)[:, None]
        keys = entries_of(state["keys"], slots, before, window, k)
        values = entries_of(state["values"], slots, before, window, v)
        key_positions = torch.cat((order.clamp(min=-1), ring_positions(before, window), positions), dim=1)
        # Where padding may lie between real tokens, the op has to look.
        ordered_from = None if self.padded else sinks
        out = self._attend(q, keys, values, positions, key_positions, ordered_from)
        self._store(state, keys, values, positions)
        return out

    @torch.no_grad()
    def _store(self, state: MixerState, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Takes the last T of the entries [B, S, H, D] into the state; positions: [B, T]."""
        window, before = self.config.window_tokens, state["last_position"]
        last = torch.maximum(before, positions.amax(1).to(torch.int32))
        order = real_tokens_first(positions) if self.padded else None
        sizes = positions.shape[1], keys.shape[1]
        in_ring = entry_columns(ring_held(last, window), before, order, *sizes)
        sink = torch.arange(self.config.sink_tokens, device=last.device).expand(len(last), -1)
        leaving = entry_columns(sink, before, order, *sizes)
        leaves = (sink > (before - window)[:, None]) & (sink <= (last - window)[:, None])  # [B, sinks]
        for name, entries in (("keys", keys), ("values", values)):
            retained = state[name][:, :, window:]
            moved = take(entries, leaving).transpose(1, 2)
            retained.copy_(torch.where(leaves[:, None, :, None], moved, retained))
            state[name][:, :, :window] = take(entries, in_ring).transpose(1, 2)
        state["last_position"].copy_(last)
