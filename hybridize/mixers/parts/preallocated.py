"""The cache of a layer that keeps full attention: keys and values are written into room that is there before them.

transformers' own layer makes both anew with every token. This one moves them a fixed number of times however long the
text gets, and with `reserve` never.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hybridize.errors import UsageError
from hybridize.mixers.parts.snapshot import Snapshot

SPARE_TOKENS = 128
SPARE_FRACTION = 8
"""Room grows by an eighth of what it holds, at least by so many tokens: a token is copied about eight times in all."""


class PreallocatedLayer(DynamicLayer):
    """Room for keys and values, [B, H, capacity, D] each; `keys` and `values` are views of what is filled.

    While gradients are recorded it does as its base, since what attention saved for them must not change.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._room: list[Tensor] = []
        """For keys and for values; empty where there is none."""
        self._shown: tuple[Tensor, Tensor] | None = None
        """The views of the room that were last handed out: others in their place, from whomever, lie elsewhere."""
        self._reserved_tokens = 0

    @property
    def capacity(self) -> int:
        """Tokens that there is room for before keys and values move."""
        return self._room[0].shape[2] if self._in_room() else self.get_seq_length()

    def reserve(self, tokens: int) -> None:
        """Makes room once for all tokens to come, or says how much to make when the first do: none moves it, nor does
        a reset, so that a captured graph may go on with it."""
        self._reserved_tokens = max(self._reserved_tokens, tokens)
        if self.get_seq_length() and self.capacity < tokens:
            self._make_room(tokens, self.keys, self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes in T tokens.

        Args:
            key_states, value_states: [B, H, T, D].

        Returns:
            All keys and all values so far, as views of the room.

        Raises:
            UsageError: the tokens are of another number of rows than those held.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():
            self._leave_room()
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        first = self.get_seq_length()
        if first and self.keys.shape[0] != key_states.shape[0]:
            raise UsageError(
                f"the cache holds {self.keys.shape[0]} rows, and tokens of {key_states.shape[0]} came.",
                hint="Use a fresh cache for another batch, or repeat or select the rows of this one.",
            )
        last = first + key_states.shape[2]
        if not self._fits(last, key_states, value_states):
            self._make_room(last, key_states, value_states)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, first:last] = new
        self._show(last)
        return self.keys, self.values

    def snapshot(self) -> Snapshot:
        """What is filled, copied."""
        tokens = self.get_seq_length()
        return Snapshot.of({"keys": self.keys, "values": self.values} if tokens else {}, tokens)

    def restore(self, saved: Snapshot) -> None:
        """Goes back to it: in the room there is, if it is large enough and of as many rows."""
        self.reset()
        if saved.seen_tokens == 0:
            return
        tensors = saved.tensors["keys"], saved.tensors["values"]
        if not self.is_initialized:
            self.lazy_initialization(*tensors)
        if not self._fits(saved.seen_tokens, *tensors):
            self._make_room(saved.seen_tokens, *tensors)
        for room, held in zip(self._room, tensors, strict=True):
            room[:, :, : saved.seen_tokens] = held
        self._show(saved.seen_tokens)

    # The transformers cache protocol, where tokens stay in the room.

    def reset(self) -> None:
        if self._in_room():
            self._show(0)
        else:
            self._leave_room()
            self.keys = self.values = None
            self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        in_room = self._in_room()
        super().crop(tokens_to_remove)
        if in_room:
            self._shown = self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place with as many indices as rows; else in new tensors, and new room with the next token."""
        if self._in_room() and self._writable() and len(beam_idx) == self.keys.shape[0]:
            for x in (self.keys, self.values):
                x.copy_(x.index_select(0, beam_idx.to(x.device)))
        else:
            super().reorder_cache(beam_idx)
            self._leave_room()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._leave_room()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._leave_room()

    def offload(self) -> None:
        super().offload()
        self._leave_room()  # it would stay on the device; the next token makes new room there

    def _in_room(self) -> bool:
        return self._shown is not None and self.keys is self._shown[0] and self.values is self._shown[1]

    def _writable(self) -> bool:
        """What was made in inference mode may not be written outside of it."""
        return torch.is_inference_mode_enabled() or not any(room.is_inference() for room in self._room)

    def _fits(self, tokens: int, *new: Tensor) -> bool:
        """Whether tokens like these may be written up to here."""
        return (
            self._in_room()
            and self._writable()
            and tokens <= self._room[0].shape[2]
            and all(_is_like(room, x) for room, x in zip(self._room, new, strict=True))
        )

    def _make_room(self, tokens: int, *new: Tensor) -> None:
        """For so many tokens like these and some more; what is held moves there."""
        held = self.get_seq_length()
        spare = max(SPARE_TOKENS, tokens // SPARE_FRACTION)
        capacity = self._reserved_tokens if tokens <= self._reserved_tokens else tokens + spare
        rooms = []
        for x, old in zip(new, (self.keys, self.values), strict=True):
            dtype = torch.promote_types(x.dtype, old.dtype) if held else x.dtype
            room = x.new_empty(*x.shape[:2], capacity, x.shape[3], dtype=dtype)
            if held:
                room[:, :, :held] = old
            rooms.append(room)
        self._room = rooms
        self._show(held)

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (room[:, :, :tokens] for room in self._room)
        self._shown = self.keys, self.values

    def _leave_room(self) -> None:
        self._room, self._shown = [], None


def _is_like(room: Tensor, new: Tensor) -> bool:
    same_sizes = room.shape[:2] == new.shape[:2] and room.shape[3] == new.shape[3]
    return same_sizes and room.device == new.device and torch.promote_types(room.dtype, new.dtype) == room.dtype


def preallocate(cache: Any, layers: Iterable[int]) -> None:
    """Puts a `PreallocatedLayer` at these indices of a cache where an ordinary dynamic layer is empty yet.

    Layers of other kinds (a sliding window of the teacher's, quantised, static) stay as they are.
    """
    for index in layers:
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[index]
        if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
            cache.layers[index] = PreallocatedLayer()
