"""The launches of the chunked kernels, each with the tensors that it fills."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..dispatch import is_nvidia
from ..launch import launch
from .input_gradient import input_gradient_kernel
from .layout import Shape, Tables
from .segments import relay_kernel, transition_kernel
from .tiles import Tile, Tiles
from .walk import BY_SEGMENT, BY_SEQUENCE, NOWHERE, backward_kernel, forward_kernel
from .within import NUM_ROWS, within_kernel

SLAB = 64
"""Rows of a state that `relay_kernel` holds."""


class Call(NamedTuple):
    """All of a call but its tensors."""

    shape: Shape
    num_sequences: int
    scale: float
    normalize: bool
    output_final: bool
    store_states: bool
    tables: Tables
    tiles: Tiles


class Parts(NamedTuple):
    """What `within_kernel` computes."""

    inverse: Tensor
    scores: Tensor
    rows: Tensor


class Walked(NamedTuple):
    """What a forward pass leaves behind for the backward pass: R, and the states that enter the chunks."""

    delta: Tensor
    states: Tensor


def within(q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, call: Call) -> Parts:
    shape, tile = call.shape, call.tiles.within
    num_chunks, heads = call.tables.chunks.shape[0], shape.state_heads
    parts = Parts(
        q.new_empty(num_chunks, heads, call.tables.chunk, call.tables.chunk),
        q.new_empty(num_chunks, heads, call.tables.chunk, call.tables.chunk),
        q.new_empty(num_chunks, heads, NUM_ROWS.value, call.tables.chunk, dtype=torch.float32),
    )
    _launch(
        within_kernel,
        num_chunks * heads,
        (q, k, log_decay, beta, call.tables.chunks, *parts),
        (call.scale, shape.query_heads, shape.key_heads, heads),
        K=shape.key_size,
        BLOCK_K=min(128, _padded(shape.key_size)),
        C=call.tables.chunk,
        NORMALIZE=call.normalize,
        PRECISION=_precision(q),
        EXACT=q.dtype == torch.float32,
        HALVES=q.dtype != torch.float32,
        **_compiled_for(tile),
    )
    return parts


def entering(
    k: Tensor, v: Tensor, parts: Parts, initial: Tensor | None, call: Call, *, training: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The state that enters each segment, and the segments' transitions; None where sequences are not cut."""
    if not call.tables.split:
        return None, None
    shape, tile = call.shape, call.tiles.transition
    num_segments, heads = call.tables.segments.shape[0], shape.state_heads
    key_size, value_size = shape.key_size, shape.value_size
    transition = k.new_empty(num_segments, heads, key_size, key_size, dtype=torch.float32)
    arriving = k.new_empty(num_segments, heads, key_size, value_size, dtype=torch.float32)
    _launch(
        transition_kernel,
        num_segments * heads * (cdiv(key_size, tile.columns) + cdiv(value_size, tile.columns)),
        (k, v, parts.inverse, parts.rows, call.tables.segments, transition, arriving),
        (shape.key_heads, shape.value_heads, heads),
        BACKWARD_TOO=training,
        **_constants(k, call, tile),
    )
    return _relay(transition, arriving, initial, call, backward=False), transition


def _relay(transition: Tensor, arriving: Tensor, outer: Tensor | None, call: Call, *, backward: bool) -> Tensor:
    shape = call.shape
    columns = min(32, _padded(shape.value_size))
    entering = torch.empty_like(arriving)
    _launch(
        relay_kernel,
        call.num_sequences * shape.state_heads * cdiv(shape.value_size, columns),
        (transition, arriving, call.tables.sequences, arriving if outer is None else outer, entering),
        (shape.state_heads,),
        K=shape.key_size,
        V=shape.value_size,
        BLOCK_V=columns,
        SLAB=min(SLAB, _padded(shape.key_size)),
        HAS_OUTER=outer is not None,
        BACKWARD=backward,
        PRECISION="tf32x3",
        num_warps=4,
        num_stages=1,
    )
    return entering


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Parts,
    initial: Tensor | None,
    entering: Tensor | None,
    call: Call,
    *,
    store: bool,
) -> tuple[Tensor, Tensor | None, Walked | None]:
    shape, tile = call.shape, call.tiles.forward
    heads, key_size, value_size = shape.state_heads, shape.key_size, shape.value_size
    output = v.new_empty(*v.shape[:2], heads, value_size)
    final = None
    if call.output_final:
        final = v.new_empty(call.num_sequences, heads, key_size, value_size, dtype=torch.float32)
    walked = None
    if store:
        walked = Walked(torch.empty_like(output), v.new_empty(call.tables.chunks.shape[0], heads, key_size, value_size))
    coming, start = _coming(initial, entering, output)
    _launch(
        forward_kernel,
        call.tables.segments.shape[0] * heads * cdiv(value_size, tile.columns),
        (
            q,
            k,
            v,
            *parts,
            call.tables.segments,
            start,
            output if final is None else final,
            output,
            *(walked or (output, output)),
        ),
        (shape.query_heads, shape.key_heads, shape.value_heads, heads),
        COMING=coming,
        GOING=NOWHERE.value if final is None else BY_SEQUENCE.value,
        STORE=store,
        **_constants(k, call, tile),
    )
    return output, final, walked


def backward(
    q: Tensor,
    k: Tensor,
    d_output: Tensor,
    parts: Parts,
    transition: Tensor | None,
    d_final: Tensor | None,
    call: Call,
    *,
    needs_initial: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    shape, tile = call.shape, call.tiles.backward
    heads, key_size, value_size = shape.state_heads, shape.key_size, shape.value_size
    num_segments = call.tables.segments.shape[0]
    state_size = (heads, key_size, value_size)

    def walk(start: Tensor | None, by: int, end: Tensor | None, to: int, stored: tuple[Tensor, Tensor] | None) -> None:
        _launch(
            backward_kernel,
            num_segments * heads * cdiv(value_size, tile.columns),
            (
                q,
                k,
                d_output,
                *parts,
                call.tables.segments,
                d_output if start is None else start,
                d_output if end is None else end,
                *(stored or (d_output, d_output)),
            ),
            (shape.query_heads, shape.key_heads, heads),
            COMING=by,
            GOING=to,
            STORE=stored is not None,
            **_constants(k, call, tile),
        )

    entering = None
    if transition is not None:
        arriving = q.new_empty(num_segments, *state_size, dtype=torch.float32)
        walk(None, NOWHERE.value, arriving, BY_SEGMENT.value, None)
        entering = _relay(transition, arriving, d_final, call, backward=True)
    d_value = torch.empty_like(d_output)
    d_states = q.new_empty(call.tables.chunks.shape[0], *state_size)
    d_initial = q.new_empty(call.num_sequences, *state_size, dtype=torch.float32) if needs_initial else None
    by, start = _coming(d_final, entering, d_output)
    walk(start, by, d_initial, BY_SEQUENCE.value if needs_initial else NOWHERE.value, (d_value, d_states))
    return d_value, d_states, d_initial


def input_gradient(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    parts: Parts,
    walked: Walked,
    d_output: Tensor,
    d_value: Tensor,
    d_states: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, tile = call.shape, call.tiles.gradient
    heads = shape.state_heads
    d_query, d_key = (x.new_empty(*x.shape[:2], heads, shape.key_size) for x in (q, k))
    d_log_decay, d_beta = torch.empty_like(log_decay), torch.empty_like(beta)
    _launch(
        input_gradient_kernel,
        call.tables.chunks.shape[0] * heads,
        (
            q,
            k,
            beta,
            walked.delta,
            d_output,
            d_value,
            parts.rows,
            call.tables.chunks,
            walked.states,
            d_states,
            d_query,
            d_key,
            d_log_decay,
            d_beta,
        ),
        (call.scale, shape.query_heads, shape.key_heads, heads),
        NORMALIZE=call.normalize,
        EXACT=k.dtype == torch.float32,
        **_constants(k, call, tile),
    )
    return d_query, d_key, d_log_decay, d_beta


def _coming(outer: Tensor | None, entering: Tensor | None, nothing: Tensor) -> tuple[int, Tensor]:
    if entering is not None:
        return BY_SEGMENT.value, entering
    return (NOWHERE.value, nothing) if outer is None else (BY_SEQUENCE.value, outer)


def _constants(k: Tensor, call: Call, tile: Tile) -> dict[str, Any]:
    return {
        "K": call.shape.key_size,
        "V": call.shape.value_size,
        "BLOCK_K": _padded(call.shape.key_size),
        "BLOCK_V": tile.columns,
        "C": call.tables.chunk,
        "PRECISION": _precision(k),
        **_compiled_for(tile),
    }


def _compiled_for(tile: Tile) -> dict[str, int]:
    registers = {"maxnreg": tile.registers} if tile.registers and is_nvidia() else {}
    return {"num_warps": tile.warps, "num_stages": tile.stages, **registers}


def _padded(size: int) -> int:
    return max(16, int(next_power_of_2(size)))


def _precision(x: Tensor) -> str:
    """Of fp32 products; others have one precision only."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _launch(
    kernel: Any, programs: int, pointers: tuple[Tensor, ...], numbers: tuple[int | float, ...], **constants: Any
) -> None:
    if programs:
        launch(kernel, (programs,), pointers, numbers, **constants)
