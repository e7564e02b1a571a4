"""Which gradient a retention score gets, and how plain PyTorch gives it to a score.

This file is no part of exported models: theirs is the straight-through gradient.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..gate_gradient.eager import gate_gradient
from .eager import NEVER, eviction_position
from .eager import retained_attention as _attend

ScoreGradient = Literal["straight_through", "outside", "logit", "counterfactual", "influence"]


class Gate(NamedTuple):
    """The gate whose gradient a score gets, in the terms of `gate_gradient`."""

    on: Literal["value", "logit"]
    hidden: bool
    largest: bool = False


GATES: dict[str, Gate | None] = {
    "straight_through": None,
    "outside": Gate("value", hidden=False),
    "logit": Gate("logit", hidden=False),
    "counterfactual": Gate("logit", hidden=True),
    "influence": Gate("logit", hidden=True, largest=True),
}
"""None: the gradient that falls out of the value's, by every query that sees the token."""


class _Decision(NamedTuple):
    """What the scores decide in, beside the tensors."""

    gate: Gate
    window: int
    sinks: int
    budget: int | None
    scale: float | None
    positions: Tensor | None
    cu_seqlens: Tensor | None


def retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retention_score: Tensor,
    *,
    window: int,
    sinks: int,
    budget: int | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float | None,
    ordered_from: int | None,
    cu_seqlens: Tensor | None,
    return_log_sum_exp: bool,
    gate: Gate,
) -> Tensor | tuple[Tensor, Tensor]:
    """The eager form of whole texts, the score's gradient being that of a gate."""
    decision = _Decision(gate, window, sinks, budget, scale, key_positions, cu_seqlens)
    output, log_sum_exp = _attend(
        q,
        k,
        v,
        retention_score.detach(),
        window=window,
        sinks=sinks,
        budget=budget,
        query_positions=query_positions,
        key_positions=key_positions,
        scale=scale,
        cu_seqlens=cu_seqlens,
        return_log_sum_exp=True,
    )
    if not return_log_sum_exp:
        log_sum_exp = log_sum_exp.detach()
    inputs = (x.detach() for x in (q, k, v))
    output, log_sum_exp = _Gated.apply(output, log_sum_exp, retention_score, *inputs, decision)
    return (output, log_sum_exp) if return_log_sum_exp else output


class _Gated(torch.autograd.Function):
    """Output and log-sum-exp as they are; their gradients reach the score, too."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        output: Tensor,
        log_sum_exp: Tensor,
        score: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decision: _Decision,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, log_sum_exp, score, q, k, v)
        ctx.decision = decision
        return output.view_as(output), log_sum_exp.view_as(log_sum_exp)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, d_output: Tensor | None, d_log_sum_exp: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        output, log_sum_exp, score, q, k, v = ctx.saved_tensors
        gate, window, sinks, budget, scale, positions, cu_seqlens = ctx.decision
        d_output = torch.zeros_like(output) if d_output is None else d_output
        delta = (d_output.to(log_sum_exp.dtype) * output).sum(-1)
        delta = delta if d_log_sum_exp is None else delta - d_log_sum_exp
        exit_row, stays = _exits(score, positions, cu_seqlens, sinks=sinks, budget=budget, window=window)
        gradient = gate_gradient(
            q,
            k,
            v,
            d_output,
            log_sum_exp,
            delta,
            exit_row,
            window=window,
            hidden=gate.hidden,
            on=gate.on,
            largest=gate.largest,
            positions=positions,
            cu_seqlens=cu_seqlens,
            scale=scale,
        )
        gradient = torch.where(score.isfinite() & ~stays, gradient, 0.0).to(score.dtype)
        return d_output, d_log_sum_exp, gradient, None, None, None, None


def _exits(score: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """int64 `[B, T, H]`, the first row that no longer sees each key outside its window, and bool `[B, T, 1]`: sinks."""
    if cu_seqlens is not None:
        bounds = list(pairwise(cu_seqlens.tolist()))
        texts = [_exits(score[:, start:stop], None, None, **options) for start, stop in bounds]
        exits = [start + row for (start, _), (row, _) in zip(bounds, texts, strict=True)]
        return torch.cat(exits, dim=1), torch.cat([stays for _, stays in texts], dim=1)
    if positions is None:
        positions = torch.arange(score.shape[1], device=score.device).expand(len(score), -1)
    until, window = eviction_position(score, positions, **options), options["window"]
    until = torch.where(until == NEVER, NEVER, until.clamp(max=NEVER - window) + window)
    # Padding between real tokens takes the position before it, so that rows stand in order.
    reached = positions.cummax(1).values
    rows = torch.searchsorted(reached, until.flatten(1)).view_as(until)
    return rows, (positions < options["sinks"])[..., None]
