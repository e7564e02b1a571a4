"""The passes of the chunked form, each with the tensors that its kernels fill."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import Launch
from .layout import Tables
from .plan import Plan, coming_from
from .walk import BY_SEGMENT, BY_SEQUENCE, NOWHERE
from .within import NUM_ROWS


class Parts(NamedTuple):
    """What `within_kernel` computes."""

    inverse: Tensor
    scores: Tensor
    rows: Tensor


class Walked(NamedTuple):
    """What a forward pass leaves behind for the backward pass: R, and the states that enter the chunks."""

    delta: Tensor
    states: Tensor


def within(plan: Plan, tables: Tables, q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor) -> Parts:
    """What the chunks know without a state."""
    size, chunk = (plan.num_chunks, plan.shape.state_heads), plan.chunk
    parts = Parts(
        q.new_empty(*size, chunk, chunk),
        q.new_empty(*size, chunk, chunk),
        torch.empty((*size, NUM_ROWS.value, chunk), dtype=torch.float32, device=q.device),
    )
    _run(plan.within, q, k, log_decay, beta, tables.chunks, *parts)
    return parts


def entering(
    plan: Plan, tables: Tables, k: Tensor, v: Tensor, parts: Parts, initial: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The state that enters each segment, and the segments' transitions; None where sequences are not cut."""
    if not plan.split:
        return None, None
    heads, key_size, _ = plan.state_shape
    transition = _states(plan.num_segments, (heads, key_size, key_size), k)
    arriving = _states(plan.num_segments, plan.state_shape, k)
    _run(plan.transition, k, v, parts.inverse, parts.rows, tables.segments, transition, arriving)
    return _relay(plan, tables, transition, arriving, initial, backward=False), transition


def forward(
    plan: Plan,
    tables: Tables,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Parts,
    initial: Tensor | None,
    entered: Tensor | None,
    *,
    final: bool,
    store: bool,
) -> tuple[Tensor, Tensor | None, Walked | None]:
    """The output, the final state if asked for, and, if they are to be stored, the states on the way."""
    heads, _, value_size = plan.state_shape
    output = _tokens(plan, v, heads, value_size)
    last = _states(plan.key.num_sequences, plan.state_shape, v) if final else None
    walked = None
    if store:
        walked = Walked(torch.empty_like(output), v.new_empty(plan.num_chunks, *plan.state_shape))
    going = int(NOWHERE.value if last is None else BY_SEQUENCE.value)
    _run(
        plan.forward(coming=coming_from(initial, entered), going=going, store=store),
        q,
        k,
        v,
        *parts,
        tables.segments,
        _first(entered, initial, output),
        _first(last, output),
        output,
        *(walked or (output, output)),
    )
    return output, last, walked


def backward(
    plan: Plan,
    tables: Tables,
    q: Tensor,
    k: Tensor,
    d_output: Tensor,
    parts: Parts,
    transition: Tensor | None,
    d_final: Tensor | None,
    *,
    needs_initial: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of the values, of the states that leave the chunks, and, if asked for, of the initial state."""
    heads, _, value_size = plan.state_shape

    def walk(
        start: Tensor | None, entered: Tensor | None, end: Tensor | None, to: int, stored: tuple[Tensor, Tensor] | None
    ) -> None:
        _run(
            plan.backward(coming=coming_from(start, entered), going=to, store=stored is not None),
            q,
            k,
            d_output,
            *parts,
            tables.segments,
            _first(entered, start, d_output),
            _first(end, d_output),
            *(stored or (d_output, d_output)),
        )

    entered = None
    if transition is not None:
        arriving = _states(plan.num_segments, plan.state_shape, q)
        walk(None, None, arriving, int(BY_SEGMENT.value), None)
        entered = _relay(plan, tables, transition, arriving, d_final, backward=True)
    d_value = _tokens(plan, d_output, heads, value_size)
    d_states = q.new_empty(plan.num_chunks, *plan.state_shape)
    d_initial = _states(plan.key.num_sequences, plan.state_shape, q) if needs_initial else None
    going = int(BY_SEQUENCE.value if needs_initial else NOWHERE.value)
    walk(d_final, entered, d_initial, going, (d_value, d_states))
    return d_value, d_states, d_initial


def input_gradient(
    plan: Plan,
    tables: Tables,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    parts: Parts,
    walked: Walked,
    output: Tensor | None,
    d_output: Tensor,
    d_value: Tensor,
    d_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k (a state head each), log_decay and beta."""
    heads, key_size, _ = plan.state_shape
    d_query, d_key = (_tokens(plan, q, heads, key_size) for _ in range(2))
    tiles, empty = plan.key_tiles, torch.zeros if plan.key.packed else torch.empty
    if tiles == 1:
        d_log_decay, d_beta = (empty(x.shape, dtype=x.dtype, device=q.device) for x in (log_decay, beta))
    else:
        parts_shape = (tiles, *log_decay.shape)
        d_log_decay, d_beta = (empty(parts_shape, dtype=torch.float32, device=q.device) for _ in range(2))
    _run(
        plan.input_gradient,
        q,
        k,
        v,
        beta,
        _first(output, walked.delta),
        walked.delta,
        d_output,
        d_value,
        parts.rows,
        tables.chunks,
        walked.states,
        d_states,
        d_query,
        d_key,
        d_log_decay,
        d_beta,
    )
    if tiles > 1:
        d_log_decay, d_beta = d_log_decay.sum(0).to(log_decay.dtype), d_beta.sum(0).to(beta.dtype)
    return d_query, d_key, d_log_decay, d_beta


def _relay(
    plan: Plan, tables: Tables, transition: Tensor, arriving: Tensor, outer: Tensor | None, *, backward: bool
) -> Tensor:
    entered = torch.empty_like(arriving)
    launch = plan.relay(has_outer=outer is not None, backward=backward)
    _run(launch, transition, arriving, tables.sequences, _first(outer, arriving), entered)
    return entered


def _tokens(plan: Plan, like: Tensor, heads: int, size: int) -> Tensor:
    """Memory of `[B, T, heads, size]`; zeros where the packed sequences may end before the text does."""
    shape = (*like.shape[:2], heads, size)
    return like.new_zeros(shape) if plan.key.packed else like.new_empty(shape)


def _states(count: int, shape: tuple[int, int, int], like: Tensor) -> Tensor:
    return torch.empty((count, *shape), dtype=torch.float32, device=like.device)


def _first(*tensors: Tensor | None) -> Tensor:
    """The first that is there; the last always is, and stands for a pointer that is not followed."""
    return next(tensor for tensor in tensors if tensor is not None)


def _run(launch: Launch | None, *pointers: Tensor) -> None:
    if launch is not None:
        launch(*pointers)
