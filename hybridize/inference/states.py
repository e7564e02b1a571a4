"""The decoding states of all layers, allocated once: what a plan promises, and no token moves them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridize.families.base import AttentionGeometry, FamilyAdapter
from hybridize.inference.full_attention import FullAttentionState
from hybridize.mixers.base import Mixer, MixerState
from hybridize.mixers.parts.position_slots import PositionState

_STACKED = ("scores", "scorer_history")
"""Written for all layers at once, at the end of a step; a layer's own are views of these."""


class States:
    """One state a layer.

    Attributes:
        layers: the states by layer.
        grows: some layer has room for `context_tokens` and no more.
        stacks: of what layers of one kind share out, [L, B, ...] by (name, first of these layers).
    """

    def __init__(
        self, model: Any, adapter: FamilyAdapter, geometry: AttentionGeometry, *, batch: int, context_tokens: int
    ) -> None:
        like = torch.empty(0, device=model.device, dtype=model.dtype)
        self.layers: list[MixerState] = []
        self.grows = False
        for layer, window in zip(adapter.layers(model.model), geometry.windows, strict=True):
            attention = adapter.attention(layer)
            if isinstance(attention, Mixer):
                state = attention.new_state(batch, like.device, like.dtype)
                if isinstance(state, PositionState):
                    self.grows = True
                    state.reserve(attention.config.capacity(context_tokens))
                    state.may_grow = False
            else:
                slots = context_tokens if window is None else min(window, context_tokens)
                self.grows |= window is None or window > context_tokens
                sizes = geometry.num_key_heads, slots, geometry.head_size
                state = FullAttentionState(batch, *sizes, window, like)
            self.layers.append(state)

    def stack(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Lays what the states of these layers share out side by side, [L, B, ...], and makes theirs views of it."""
        stacks = {}
        for name in _STACKED:
            stacks[name] = torch.stack([self.layers[index][name] for index in indices])
            for index, part in zip(indices, stacks[name], strict=True):
                self.layers[index][name] = part
        return stacks

    def bytes_per_sequence(self) -> int:
        return sum(state.bytes_per_sequence() for state in self.layers)

    def rows(self, first: int, end: int, seen_tokens: int, before: Tensor | None = None) -> RowStates:
        """The states of these rows as a cache; what is written there is written here.

        Args:
            seen_tokens: of the rows, at most; 0: none has read anything.
            before: [end - first], position of each row's newest token; where there is padding among the new ones.
        """
        return RowStates([_rows_of(state, first, end, seen_tokens) for state in self.layers], before)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, [B, ...], by a name of its own."""
        for index, state in enumerate(self.layers):
            for name, tensor in state.tensors.items():
                yield f"layers.{index}.{name}", tensor

    def reset(self) -> None:
        for state in self.layers:
            state.reset()

    def take(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, in place. rows: [B]."""
        for _, tensor in self.named():
            tensor.copy_(tensor.index_select(0, rows))


class RowStates:
    """The states of some rows in the form of a transformers cache, which mixers take.

    Attributes:
        before: [B], position of each row's newest token, or None: see `States.rows`.
        padded: whether some of the positions that come with it are padding, so that no layer asks the device.
    """

    def __init__(self, layers: list[MixerState], before: Tensor | None = None) -> None:
        self.layers, self.before = layers, before
        self.padded = before is not None

    def get_seq_length(self) -> int:
        return self.layers[0].seen_tokens


def _rows_of(state: MixerState, first: int, end: int, seen_tokens: int) -> MixerState:
    part = copy.copy(state)
    part.tensors = {name: tensor[first:end] for name, tensor in state.tensors.items()}
    part.seen_tokens, part.workspace = seen_tokens, {}
    return part
