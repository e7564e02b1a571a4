"""Full attention from a cache of fixed place: keys and values by position, written in place.

Rows may stand at positions of their own. A layer with a sliding window of its own has a ring of so many slots. A
decoding step is `retained_decode`, which reads what is occupied and no more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hybridize.families.base import FamilyAdapter
from hybridize.mixers.base import MixerState
from hybridize.mixers.parts.slots import entries_of, entry_columns, real_tokens_first, ring_held, ring_positions, take
from hybridize.model.training_form import project
from hybridize_kernels import retained_attention, rotary

_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class FullAttentionState(MixerState):
    """Tensors "keys" and "values" [B, H, slots, D]: position p lies in slot p mod slots.

    Args:
        batch, heads, slots, head_size: B, H, tokens, D.
        window: the layer's own sliding window in tokens, or None.
        like: whose type and device the state has.
    """

    def __init__(self, batch: int, heads: int, slots: int, head_size: int, window: int | None, like: Tensor) -> None:
        super().__init__({name: like.new_zeros(batch, heads, slots, head_size) for name in ("keys", "values")})
        self.window = window
        self.last_position = like.new_full((batch,), -1, dtype=torch.int32)
        """What `retained_decode` leaves; the positions of all layers are the engine's."""

    @property
    def slots(self) -> int:
        return self["keys"].shape[2]


class CachedAttention:
    """A decoder layer's own attention over a state, for many tokens at once; it is called as a mixer is.

    Args:
        attention: transformers' module. adapter: of its family.
    """

    def __init__(self, attention: nn.Module, adapter: FamilyAdapter) -> None:
        self.attention: Any = attention
        self.adapter = adapter

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Any,
        token_positions: Tensor | None,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, width], token_positions [B, T], −1 for padding, or None: all rows go on alike."""
        attention = self.attention
        state: FullAttentionState = cache.layers[attention.layer_idx]
        shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
        modules = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (x.view(shape) for x in project(hidden_states, modules))
        if self.adapter.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = rotary(q, k, *position_embeddings)
        out = read(q, k, v, state, token_positions, scale=attention.scaling, before=cache.before)
        return project(out.reshape(*hidden_states.shape[:-1], -1), (attention.o_proj,))[0], None


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FullAttentionState,
    positions: Tensor | None,
    *,
    scale: float,
    before: Tensor | None = None,
) -> Tensor:
    """Takes T tokens a row into the state and attends from them.

    Args:
        q: [B, T, HQ, D]. k, v: [B, T, H, D]; rotary positions applied.
        positions: [B, T], −1 for padding; None: from `state.seen_tokens` on, in every row.
        before: [B], position of each row's newest token so far, given where there is padding.

    Returns:
        [B, T, HQ, D].
    """
    if state.window is not None:
        return _read_into_ring(q, k, v, state, positions, scale, before)
    if positions is None:
        first, end = state.seen_tokens, state.seen_tokens + q.shape[1]
        for name, new in (("keys", k), ("values", v)):
            state[name][:, :, first:end] = new.transpose(1, 2)
        if first == 0:
            return _attend_whole(q, k, v, scale)
        keys, values = (state[name][:, :, :end].transpose(1, 2) for name in ("keys", "values"))
        return retained_attention(q, keys, values, window=end, scale=scale)
    real = positions >= 0
    rows, columns = real.nonzero(as_tuple=True)
    place = positions[rows, columns]
    for name, new in (("keys", k), ("values", v)):
        state[name][rows, :, place] = new[rows, columns]
    out = torch.zeros_like(q)
    for row, (length, end) in enumerate(zip(real.sum(1).tolist(), (positions.amax(1) + 1).tolist(), strict=True)):
        if length:  # each by itself: a mask of all would have as many numbers as queries times slots
            keys, values = (state[name][row : row + 1, :, :end].transpose(1, 2) for name in ("keys", "values"))
            own = slice(row, row + 1), real[row]
            out[own] = retained_attention(q[own], keys, values, window=end, scale=scale)
    return out


def _attend_whole(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(_BACKENDS, set_priority=True):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _read_into_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FullAttentionState,
    positions: Tensor | None,
    scale: float,
    before: Tensor | None,
) -> Tensor:
    slots, (batch, num_new) = state.slots, q.shape[:2]
    padded = before is not None
    if positions is None:
        first = state.seen_tokens
        positions = torch.arange(first, first + num_new, device=q.device).expand(batch, -1)
    before = (positions[:, 0] - 1 if before is None else before).to(torch.int32)
    nothing = torch.empty(batch, 1, 0, dtype=torch.int64, device=q.device)
    keys = entries_of(state["keys"], nothing, before, slots, k)
    values = entries_of(state["values"], nothing, before, slots, v)
    key_positions = torch.cat((ring_positions(before, slots), positions), dim=1)
    out = retained_attention(
        q,
        keys,
        values,
        window=state.window if state.window is not None else slots,
        scale=scale,
        query_positions=positions,
        key_positions=key_positions,
        ordered_from=None if padded else 0,
    )
    last = torch.maximum(before, positions.amax(1).to(torch.int32))
    order = real_tokens_first(positions) if padded else None
    in_ring = entry_columns(ring_held(last, slots), before, order, num_new, keys.shape[1])
    for name, entries in (("keys", keys), ("values", values)):
        state[name].copy_(take(entries, in_ring).transpose(1, 2))
    return out
