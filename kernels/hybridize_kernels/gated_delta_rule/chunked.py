"""The gated delta rule by the chunked Triton kernels, as one differentiable function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import needs_grad
from .launches import Parts, Walked, backward, entering, forward, input_gradient, within
from .layout import Shape, Tables
from .plan import Plan, PlanKey, plan_of
from .tiles import Tiles


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
    out_dtype = v.dtype
    if not q.dtype == k.dtype == v.dtype:
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    (batch, time, query_heads, key_size), (_, _, value_heads, value_size) = q.shape, v.shape
    key = PlanKey(
        Shape(query_heads, k.shape[2], value_heads, log_decay.shape[2], key_size, value_size),
        batch,
        time,
        batch if cu_seqlens is None else cu_seqlens.numel() - 1,
        cu_seqlens is not None,
        key_size**-0.5 if scale is None else float(scale),
        normalize_qk,
        needs_grad(q, k, v, log_decay, beta, initial_state),
        q.dtype,
        (log_decay.dtype, beta.dtype),
        q.get_device(),
        tiles,
        segment_chunks,
    )
    plan = plan_of(key)
    call = _Call(plan, plan.tables(cu_seqlens, q.device), output_final_state, store_states)
    output, final_state = _GatedDeltaRule.apply(q, k, v, log_decay, beta, initial_state, call)
    return output.to(out_dtype), final_state


class _Call(NamedTuple):
    """What autograd does not see."""

    plan: Plan
    tables: Tables
    output_final: bool
    store_states: bool


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
        call: _Call,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        q, k, v, log_decay, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
        plan, tables = call.plan, call.tables
        initial = _wide(initial_state)
        parts = within(plan, tables, q, k, log_decay, beta)
        entered, transition = entering(plan, tables, k, v, parts, initial)
        store = plan.key.training and call.store_states
        output, final, walked = forward(
            plan, tables, q, k, v, parts, initial, entered, final=call.output_final, store=store
        )
        if plan.key.training:
            # Without stored states the chunks are walked once more in the backward pass.
            kept = (*parts, *walked) if walked is not None else ()
            asked = output if plan.needs_output else None
            ctx.save_for_backward(q, k, v, log_decay, beta, initial_state, asked, transition if kept else None, *kept)
            ctx.call = call
        return output, final

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, d_output: Tensor | None, d_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, initial_state, output, transition, *kept = ctx.saved_tensors
        call: _Call = ctx.call
        plan, tables = call.plan, call.tables
        if kept:
            parts, walked = Parts(*kept[:3]), Walked(*kept[3:])
        else:
            initial = _wide(initial_state)
            parts = within(plan, tables, q, k, log_decay, beta)
            entered, transition = entering(plan, tables, k, v, parts, initial)
            _, _, again = forward(plan, tables, q, k, v, parts, initial, entered, final=False, store=True)
            assert again is not None
            walked = again
        d_output = torch.zeros_like(walked.delta) if d_output is None else d_output.contiguous()
        d_value, d_states, d_initial = backward(
            plan, tables, q, k, d_output, parts, transition, _wide(d_final), needs_initial=ctx.needs_input_grad[5]
        )
        d_query, d_key, d_log_decay, d_beta = input_gradient(
            plan, tables, q, k, v, log_decay, beta, parts, walked, output, d_output, d_value, d_states
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
    """Sums the gradients of the state heads that share a head of `like`; torch adds halves up in fp32."""
    if gradient.shape == like.shape:
        return gradient
    batch, time, heads, size = like.shape
    return gradient.view(batch, time, heads, gradient.shape[2] // heads, size).sum(3)
