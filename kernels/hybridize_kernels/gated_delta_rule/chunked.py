"""The gated delta rule by the chunked Triton kernels, as one differentiable function."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import cdiv

from ..dispatch import multiprocessors
from .launches import Call, Parts, Walked, backward, entering, forward, input_gradient, within
from .layout import Shape, tables
from .tiles import Tiles, tiles_for

LEAST_SEGMENT = 8
"""Chunks of the shortest segment: shorter ones would spend their time on states that come and go."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize_qk: bool = False,
    cu_seqlens: Tensor | None = None,
    store_states: bool = True,
    tiles: Tiles | None = None,
    segment_chunks: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `hybridize_kernels.gated_delta_rule`.

    Args:
        tiles: instead of the table's. segment_chunks: chunks of a segment, instead of what is thought best.
    """
    dtype = reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    (batch, time, query_heads, key_size), value_size = q.shape, v.shape[3]
    shape = Shape(query_heads, k.shape[2], v.shape[2], log_decay.shape[2], key_size, value_size)
    num_sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    tiles = tiles or tiles_for(key_size, value_size, dtype)
    if segment_chunks is None:
        chunks = cdiv(batch * time, tiles.chunk * max(1, num_sequences))
        segment_chunks = _segment_chunks(chunks, num_sequences, shape, tiles, multiprocessors(q.get_device()))
    call = Call(
        shape,
        num_sequences,
        key_size**-0.5 if scale is None else float(scale),
        normalize_qk,
        output_final_state,
        store_states,
        tables(batch, time, cu_seqlens, q.device, chunk=tiles.chunk, segment_chunks=segment_chunks),
        tiles,
    )
    out_dtype = v.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    output, final_state = _GatedDeltaRule.apply(q, k, v, log_decay, beta, initial_state, call)
    return output.to(out_dtype), final_state


def _segment_chunks(chunks: int, num_sequences: int, shape: Shape, tiles: Tiles, processors: int) -> int | None:
    """Chunks of a segment, or None where sequences are not cut: their heads keep the GPU busy.

    Segments cost most of a second walk over the chunks; with less than half of the processors at work it is worth it.
    """
    programs = num_sequences * shape.state_heads * cdiv(shape.value_size, tiles.forward.columns)
    if 2 * programs > processors or chunks < 2 * LEAST_SEGMENT:
        return None
    return max(LEAST_SEGMENT, int(cdiv(chunks, 2 * processors // programs)))


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        q, k, v, log_decay, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
        training = any(ctx.needs_input_grad)
        parts = within(q, k, log_decay, beta, call)
        initial = _wide(initial_state)
        entered, transition = entering(k, v, parts, initial, call, training=training)
        store = training and call.store_states
        output, final, walked = forward(q, k, v, parts, initial, entered, call, store=store)
        if training:
            # Without stored states the chunks are walked once more in the backward pass.
            kept = (*parts, *walked) if walked is not None else ()
            ctx.save_for_backward(q, k, v, log_decay, beta, initial_state, transition, *kept)
            ctx.call = call
        return output, final

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, d_output: Tensor | None, d_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, initial_state, transition, *kept = ctx.saved_tensors
        call: Call = ctx.call
        if kept:
            parts, walked = Parts(*kept[:3]), Walked(*kept[3:])
        else:
            parts = within(q, k, log_decay, beta, call)
            initial = _wide(initial_state)
            entered, _ = entering(k, v, parts, initial, call, training=False)
            _, _, again = forward(q, k, v, parts, initial, entered, call, store=True)
            assert again is not None
            walked = again
        d_output = torch.zeros_like(walked.delta) if d_output is None else d_output.contiguous()
        d_value, d_states, d_initial = backward(
            q, k, d_output, parts, transition, _wide(d_final), call, needs_initial=ctx.needs_input_grad[5]
        )
        d_query, d_key, d_log_decay, d_beta = input_gradient(
            q, k, log_decay, beta, parts, walked, d_output, d_value, d_states, call
        )
        return (
            _sum_group(d_query, q),
            _sum_group(d_key, k),
            _sum_group(d_value, v),
            d_log_decay,
            d_beta,
            d_initial if d_initial is None or initial_state is None else d_initial.to(initial_state.dtype),
            None,
        )


def _wide(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.float().contiguous()


def _sum_group(gradient: Tensor, like: Tensor) -> Tensor:
    """Sums the gradients of the state heads that share a head of `like`."""
    if gradient.shape == like.shape:
        return gradient
    batch, time, heads, size = like.shape
    return gradient.view(batch, time, heads, -1, size).sum(3, dtype=torch.float32).to(like.dtype)
