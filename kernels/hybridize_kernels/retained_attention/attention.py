"""Retained attention by the Triton kernels, as one differentiable function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..gate_gradient.kernel import gate_gradient_in_order
from .backward import attend_backward
from .forward import attend
from .layout import Geometry, Vectors, document_vectors, padding_vectors
from .lists import RetainedLists, retained_lists
from .plan import Plan, PlanKey, plan_of, tiles_override
from .score_gradient import Gate


def retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retention_score: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    budget: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    ordered_from: int | None = None,
    cu_seqlens: Tensor | None = None,
    return_log_sum_exp: bool = False,
    gate: Gate | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `hybridize_kernels.retained_attention`."""
    call = call_of(
        k,
        window=window,
        sinks=sinks,
        budget=budget,
        query_positions=query_positions,
        key_positions=key_positions,
        scale=scale,
        ordered_from=ordered_from,
        cu_seqlens=cu_seqlens,
    )._replace(gate=gate)
    output, log_sum_exp = _RetainedAttention.apply(q, k, v, retention_score, call)
    return (output, log_sum_exp) if return_log_sum_exp else output


class Call(NamedTuple):
    """What autograd does not see.

    Attributes:
        slots: the positions of keys of which some come from a cache.
        gate: whose gradient the score gets, None: that of one on the value.
    """

    window: int
    sinks: int
    budget: int | None
    scale: float | None
    prefix: int
    vectors: Vectors
    order: Tensor | None
    slots: Tensor | None
    gate: Gate | None = None


def call_of(
    k: Tensor,
    *,
    window: int,
    sinks: int = 0,
    budget: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    ordered_from: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Call:
    """The arguments in the kernels' terms."""
    order = None
    if key_positions is not None and cu_seqlens is None and ordered_from is None:
        # Padding may lie anywhere: the real tokens of a row go to its right end.
        order = (key_positions >= 0).to(torch.uint8).argsort(dim=1, stable=True)
        query_positions = key_positions = key_positions.gather(1, order)
    prefix = ordered_from or 0
    vectors = Vectors()
    if cu_seqlens is not None:
        vectors = document_vectors(cu_seqlens, k.shape[1])
    elif key_positions is not None and query_positions is not None:
        vectors = padding_vectors(query_positions, key_positions, prefix)
    slots = key_positions if ordered_from is not None else None
    return Call(window, sinks, budget, None if scale is None else float(scale), prefix, vectors, order, slots)


class Attended(NamedTuple):
    """A forward pass, as its backward pass needs it: tensors in the kernels' order, and how they were made."""

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    log_sum_exp: Tensor
    work: Work


class Work(NamedTuple):
    """What is known of a forward pass beside its tensors."""

    call: Call
    plan: Plan
    lists: RetainedLists | None


def attend_once(q: Tensor, k: Tensor, v: Tensor, score: Tensor | None, call: Call) -> Attended:
    """The forward pass by itself; autograd does not see it."""
    q, k, v = _ready(q, call.order), _ready(k, call.order), _ready(v, call.order)
    ranked = score if score is None or call.order is None else _take(score, call.order)
    sinks = call.sinks
    if call.slots is not None and (sinks or (call.prefix and score is not None)):
        # Neither a slot's emptiness nor a sink can be told from its column.
        ranked, sinks = _score_of_prefix(score, call.slots, sinks, k.shape[2]), 0
    plan = _plan(q, k, v, ranked, sinks, call)
    lists = None if plan.lists is None else retained_lists(plan.lists, ranked, call.vectors, q.device)
    output, log_sum_exp = attend(plan.forward, q, k, v, lists, call.vectors)
    return Attended(q, k, v, output, log_sum_exp, Work(call, plan, lists))


def gradients_of(
    attended: Attended, score: Tensor | None, d_output: Tensor, d_log_sum_exp: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and that of the score, if one is given, all in the kernels' order, as what is given."""
    q, k, v, output, log_sum_exp, (call, plan, lists) = attended
    straight = score if call.gate is None else None
    backward = plan.backward(
        d_output.stride()[:3],
        None if straight is None else straight.stride(),
        None if straight is None else straight.dtype,
        d_log_sum_exp is not None,
    )
    dq, dk, dv, d_score, rows = attend_backward(
        backward, q, k, v, straight, output, log_sum_exp, d_output, d_log_sum_exp, lists, call.vectors
    )
    if score is not None and call.gate is not None:
        d_score = _gradient_of_gate(attended, score, call.gate, d_output, rows)
    return dq, dk, dv, d_score


class _RetainedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, score: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        attended = attend_once(q, k, v, score, call)
        ctx.save_for_backward(*attended[:5], score)
        ctx.work = attended.work
        output, log_sum_exp = attended.output, attended.log_sum_exp
        if call.order is not None:
            back = call.order.argsort(dim=1)
            output, log_sum_exp = _take(output, back), _take(log_sum_exp, back)
        return output, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, d_output: Tensor | None, d_log_sum_exp: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, output, log_sum_exp, score = ctx.saved_tensors
        attended, order = Attended(q, k, v, output, log_sum_exp, ctx.work), ctx.work.call.order
        d_output = torch.zeros_like(attended.output) if d_output is None else _ready(d_output, order)
        if d_log_sum_exp is not None:
            d_log_sum_exp = _ready(d_log_sum_exp, order).contiguous()
        if score is not None:
            if not ctx.needs_input_grad[3]:
                score = None
            elif order is not None:
                score = _take(score, order)
        gradients = gradients_of(attended, score, d_output, d_log_sum_exp)
        if order is not None:
            back = order.argsort(dim=1)
            return *[None if x is None else _take(x, back) for x in gradients], None
        return *gradients, None


def _gradient_of_gate(attended: Attended, score: Tensor, gate: Gate, d_output: Tensor, rows: Tensor) -> Tensor:
    """The score's, `[B, S, H]`, in the kernels' order: 0 of infinite ones, and of sinks, which stay whatever it is."""
    q, k, v, _, _, (call, _, lists) = attended
    batch, keys, heads = score.shape
    return gate_gradient_in_order(
        q,
        k,
        v,
        d_output,
        rows,
        torch.zeros((batch, heads, keys), dtype=torch.int32, device=q.device) if lists is None else lists.exit,
        call.vectors,
        window=call.window,
        hidden=gate.hidden,
        on=gate.on,
        largest=gate.largest,
        scale=call.scale,
        score=score,
        sinks=call.sinks,
    )


def _plan(q: Tensor, k: Tensor, v: Tensor, score: Tensor | None, sinks: int, call: Call) -> Plan:
    (batch, time, query_heads, head_size), (keys, heads) = q.shape, k.shape[1:3]
    geometry = Geometry(
        batch=batch,
        time=time,
        keys=keys,
        heads=heads,
        group=query_heads // heads,
        head_size=head_size,
        window=min(call.window, keys),
        offset=keys - time,
        prefix=call.prefix,
        padded=call.vectors.query_start is not None,
    )
    return plan_of(
        PlanKey(
            geometry,
            q.dtype,
            (q.stride()[:3], k.stride()[:3], v.stride()[:3]),
            None if score is None else score.stride(),
            None if score is None else score.dtype,
            sinks,
            call.budget,
            head_size**-0.5 if call.scale is None else call.scale,
            q.get_device(),
            tiles_override(),
        )
    )


def _score_of_prefix(score: Tensor | None, positions: Tensor, sinks: int, heads: int) -> Tensor:
    """Scores `[B, S, H]` that say by themselves which slots are empty and which hold sinks."""
    if positions.ndim == 2:
        positions = positions[..., None].expand(-1, -1, heads)
    if score is None:
        score = torch.full(positions.shape, -1.0, device=positions.device)
    score = torch.where((positions >= 0) & (positions < sinks), torch.inf, score.float())
    return torch.where(positions >= 0, score, -1.0)


def _ready(x: Tensor, order: Tensor | None) -> Tensor:
    """In the kernels' order, with features side by side."""
    if order is not None:
        return _take(x, order)
    return x if x.stride(-1) == 1 else x.contiguous()


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x `[B, T, ...]` at index `[B, T]`."""
    return x.gather(1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
