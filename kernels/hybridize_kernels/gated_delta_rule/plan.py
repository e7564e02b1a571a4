"""All of a call but its tensors, worked out once for calls that agree in it: sizes, segments, launches.

A step of a short text would else spend longer on working them out than in the kernels.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..dispatch import is_nvidia, multiprocessors
from ..launch import Launch
from .input_gradient import input_gradient_kernel
from .layout import Shape, Tables, most_chunks, most_segments, tables
from .segments import relay_kernel, transition_kernel
from .tiles import Tile, Tiles, tiles_for
from .walk import BY_SEGMENT, BY_SEQUENCE, NOWHERE, backward_kernel, forward_kernel
from .within import within_kernel

LEAST_SEGMENT = 8
"""Chunks of the shortest segment: shorter ones would spend their time on states that come and go."""
KEY_TILE = 128
"""Numbers of a key that a program of `input_gradient_kernel` takes, and a step of `within_kernel`."""
LEAST_KEY_BLOCK = 64
"""Numbers of a key that a compiled tile has at least."""
SLAB = 64
"""Rows of a state that `relay_kernel` holds."""
RELAY_COLUMNS = 16
"""Columns of a state that a program of `relay_kernel` takes from segment to segment: few, since segments wait."""
MOST = 512
"""Plans kept; texts of ever new lengths make ever new ones."""


class PlanKey(NamedTuple):
    """What a plan depends on.

    Attributes:
        batch, time: B and T. num_sequences: B, or the packed ones. packed: whether they are.
        scale, normalize: as in gated_delta_rule. training: whether a backward pass may follow.
        dtype: of q, k and v. gate_dtypes: of log_decay and beta.
        device: index of the GPU, −1 for the CPU.
        tiles, segment_chunks: instead of the table's, or what is thought best.
    """

    shape: Shape
    batch: int
    time: int
    num_sequences: int
    packed: bool
    scale: float
    normalize: bool
    training: bool
    dtype: torch.dtype
    gate_dtypes: tuple[torch.dtype, torch.dtype]
    device: int
    tiles: Tiles | None
    segment_chunks: int | None


class Plan:
    """The launches of calls with the same key, made when they are first asked for.

    Attributes:
        chunk: C. key_block: numbers of a key in a tile, a power of two.
        segment_chunks: chunks of a segment, or None where a sequence is one segment.
        num_chunks, num_segments: rows of the tables. split: whether sequences have several segments.
    """

    def __init__(self, key: PlanKey) -> None:
        self.key, self.shape = key, key.shape
        compiled = key.device >= 0
        self.tiles = key.tiles or tiles_for(key.shape.key_size, key.shape.value_size, key.dtype, compiled=compiled)
        # As in `tiles_for`: interpreted, a tile is as narrow as a head.
        self.key_block = max(LEAST_KEY_BLOCK if compiled else 16, int(next_power_of_2(key.shape.key_size)))
        self.chunk = self.tiles.chunk
        self.segment_chunks = key.segment_chunks or self._segment_chunks()
        self.num_chunks = most_chunks(key.num_sequences, key.time, key.packed, self.chunk)
        self.num_segments = most_segments(key.num_sequences, key.time, key.packed, self.chunk, self.segment_chunks)
        self.split = self.num_segments > key.num_sequences
        self.state_shape = (key.shape.state_heads, key.shape.key_size, key.shape.value_size)
        self._walks: dict[tuple[Any, ...], Launch | None] = {}

    def tables(self, cu_seqlens: Tensor | None, device: torch.device) -> Tables:
        key = self.key
        segment_chunks = self.segment_chunks if self.split else None
        return tables(key.batch, key.time, cu_seqlens, device, chunk=self.chunk, segment_chunks=segment_chunks)

    def _segment_chunks(self) -> int | None:
        """Chunks of a segment, or None where sequences are not cut: their heads keep the GPU busy.

        Segments cost most of a second walk over the chunks: worth it where less than half of the GPU would be at work.
        """
        key, tiles = self.key, self.tiles
        tile = tiles.backward if key.training else tiles.forward
        programs = key.num_sequences * self.shape.state_heads * cdiv(self.shape.value_size, tile.columns)
        chunks = cdiv(key.batch * key.time, self.chunk * max(1, key.num_sequences))
        room = multiprocessors(key.device) * tile.resident
        if 2 * programs > room or chunks < 2 * LEAST_SEGMENT or not programs:
            return None
        return max(LEAST_SEGMENT, int(cdiv(chunks, room // programs)))

    # The launches; None where there is nothing to launch for.

    @cached_property
    def within(self) -> Launch | None:
        shape, tile = self.shape, self.tiles.within
        return _launch(
            within_kernel,
            self.num_chunks * shape.state_heads,
            (self.key.scale, shape.query_heads, shape.key_heads, shape.state_heads),
            K=shape.key_size,
            BLOCK_K=min(KEY_TILE, self.key_block),
            C=self.chunk,
            NORMALIZE=self.key.normalize,
            PRECISION=self._precision,
            EXACT=self.key.dtype == torch.float32,
            HALVES=self.key.dtype != torch.float32,
            **_compiled_for(tile),
        )

    @cached_property
    def transition(self) -> Launch | None:
        shape, tile = self.shape, self.tiles.transition
        return _launch(
            transition_kernel,
            self.num_segments
            * shape.state_heads
            * (cdiv(shape.key_size, tile.columns) + cdiv(shape.value_size, tile.columns)),
            (shape.key_heads, shape.value_heads, shape.state_heads),
            BACKWARD_TOO=self.key.training,
            **self._constants(tile),
        )

    def relay(self, *, has_outer: bool, backward: bool) -> Launch | None:
        index = ("relay", has_outer, backward)
        if index not in self._walks:
            shape = self.shape
            self._walks[index] = _launch(
                relay_kernel,
                self.key.num_sequences * shape.state_heads * cdiv(shape.value_size, RELAY_COLUMNS),
                (shape.state_heads,),
                K=shape.key_size,
                V=shape.value_size,
                BLOCK_V=RELAY_COLUMNS,
                SLAB=min(SLAB, self.key_block),
                HAS_OUTER=has_outer,
                BACKWARD=backward,
                PRECISION="tf32x3",
                num_warps=4,
                num_stages=1,
            )
        return self._walks[index]

    def forward(self, *, coming: int, going: int, store: bool) -> Launch | None:
        shape = self.shape
        heads = (shape.query_heads, shape.key_heads, shape.value_heads, shape.state_heads)
        return self._walk(forward_kernel, self.tiles.forward, heads, COMING=coming, GOING=going, STORE=store)

    def backward(self, *, coming: int, going: int, store: bool) -> Launch | None:
        heads = (self.shape.query_heads, self.shape.key_heads, self.shape.state_heads)
        return self._walk(backward_kernel, self.tiles.backward, heads, COMING=coming, GOING=going, STORE=store)

    def _walk(self, kernel: Any, tile: Tile, heads: tuple[int, ...], **ways: int) -> Launch | None:
        """A program for each segment, state head and tile of the values."""
        index = (kernel.__name__, *ways.values())
        if index not in self._walks:
            programs = self.num_segments * self.shape.state_heads * int(cdiv(self.shape.value_size, tile.columns))
            self._walks[index] = _launch(kernel, programs, heads, **ways, **self._constants(tile))
        return self._walks[index]

    @cached_property
    def input_gradient(self) -> Launch | None:
        shape, constants = self.shape, self._constants(self.tiles.gradient)
        constants["BLOCK_K"] = min(KEY_TILE, constants["BLOCK_K"])
        num_gates = self.key.batch * self.key.time * shape.state_heads
        return _launch(
            input_gradient_kernel,
            self.num_chunks * shape.state_heads * self.key_tiles,
            (self.key.scale, shape.query_heads, shape.key_heads, shape.value_heads, shape.state_heads, num_gates),
            NORMALIZE=self.key.normalize,
            EXACT=self.key.dtype == torch.float32,
            **constants,
        )

    @property
    def key_tiles(self) -> int:
        """Programs that share a chunk's gradients."""
        return int(cdiv(self.shape.key_size, KEY_TILE))

    @property
    def needs_output(self) -> bool:
        """Whether the backward pass takes a norm's gradient from the output (see `input_gradient`)."""
        return self.key.normalize and self.key_tiles > 1

    def _constants(self, tile: Tile) -> dict[str, Any]:
        return {
            "K": self.shape.key_size,
            "V": self.shape.value_size,
            "BLOCK_K": self.key_block,
            "BLOCK_V": tile.columns,
            "C": self.chunk,
            "PRECISION": self._precision,
            **_compiled_for(tile),
        }

    @property
    def _precision(self) -> str:
        """Of fp32 products; others have one precision only."""
        return "tf32x3" if self.key.dtype == torch.float32 else "tf32"


plan_of = lru_cache(maxsize=MOST)(Plan)
"""The plan of a key, from memory where it has been made."""


def coming_from(outer: Tensor | None, entering: Tensor | None) -> int:
    """How a walk finds its first state: by segment where there are several, else by sequence if there is one."""
    if entering is not None:
        return int(BY_SEGMENT.value)
    return int(NOWHERE.value if outer is None else BY_SEQUENCE.value)


def _launch(kernel: Any, programs: int, numbers: tuple[int | float, ...], **constants: Any) -> Launch | None:
    return Launch(kernel, (programs,), numbers, constants) if programs else None


def _compiled_for(tile: Tile) -> dict[str, int]:
    registers = {"maxnreg": tile.registers} if tile.registers and is_nvidia() else {}
    return {"num_warps": tile.warps, "num_stages": tile.stages, **registers}
