"""Retained attention by the Triton kernels, as one differentiable function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backward import attend_backward
from .forward import attend
from .layout import Layout, document_vectors, padding_vectors
from .lists import RetainedLists, retained_lists
from .tiles import Tiles, tiles_for

CHUNK = 512
LONG_CHUNK = 1024
LONG = 8192
"""Query rows that share a list of retained keys under a cap: a shorter chunk has fewer entries that only some of its
queries see, a longer one fewer partial gradients. From LONG tokens on few entries change in a chunk."""


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
) -> Tensor | tuple[Tensor, Tensor]:
    """See `hybridize_kernels.retained_attention`."""
    order = None
    if key_positions is not None and cu_seqlens is None and ordered_from is None:
        # Padding may lie anywhere: the real tokens of a row go to its right end.
        order = (key_positions >= 0).to(torch.uint8).argsort(dim=1, stable=True)
        query_positions = key_positions = key_positions.gather(1, order)
    prefix = ordered_from or 0
    score = None if retention_score is None else retention_score.detach()
    if order is not None and score is not None:
        score = _take(score, order)
    if ordered_from is not None and key_positions is not None and (sinks or (prefix and score is not None)):
        # Neither a slot's emptiness nor a sink can be told from its column.
        score, sinks = _score_of_prefix(score, key_positions, sinks, k.shape[2]), 0
    layout = _layout(q, k, window, query_positions, key_positions, prefix, cu_seqlens)
    tiles = tiles_for(layout.head_size, layout.group, q.dtype)
    lists = None
    some = (score is not None or sinks > 0) and budget != 0
    if some and (prefix > 0 or layout.window < layout.keys):
        block = tiles.forward.rows // layout.group
        chunk = max(1, (CHUNK if layout.time <= LONG else LONG_CHUNK) // block) * block
        lists = retained_lists(score, layout, sinks=sinks, budget=budget, block=block, chunk=chunk)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    call = _Call(lists, layout, scale, tiles, order)
    output, log_sum_exp = _RetainedAttention.apply(q, k, v, retention_score, call)
    return (output, log_sum_exp) if return_log_sum_exp else output


@dataclass(frozen=True)
class _Call:
    lists: RetainedLists | None
    layout: Layout
    scale: float
    tiles: Tiles
    order: Tensor | None


class _RetainedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, score: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        q, k, v = (_ready(x, call.order) for x in (q, k, v))
        output, log_sum_exp = attend(q, k, v, call.lists, call.layout, call.scale, call.tiles.forward)
        ctx.save_for_backward(q, k, v, output, log_sum_exp, score)
        ctx.call = call
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
        call: _Call = ctx.call
        d_output = torch.zeros_like(output) if d_output is None else _ready(d_output, call.order)
        if d_log_sum_exp is not None:
            d_log_sum_exp = _ready(d_log_sum_exp, call.order).contiguous()
        if score is not None and not ctx.needs_input_grad[3]:
            score = None
        gradients: tuple[Tensor | None, ...] = attend_backward(
            q,
            k,
            v,
            score if score is None or call.order is None else _take(score, call.order),
            output,
            log_sum_exp,
            d_output,
            d_log_sum_exp,
            call.lists,
            call.layout,
            call.scale,
            call.tiles,
        )
        if call.order is not None:
            back = call.order.argsort(dim=1)
            gradients = tuple(None if x is None else _take(x, back) for x in gradients)
        return *gradients, None


def _layout(
    q: Tensor,
    k: Tensor,
    window: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    prefix: int,
    cu_seqlens: Tensor | None,
) -> Layout:
    (batch, time, query_heads, head_size), (keys, heads) = q.shape, k.shape[1:3]
    vectors: dict[str, Tensor] = {}
    if cu_seqlens is not None:
        vectors = document_vectors(cu_seqlens, keys)
    elif key_positions is not None and query_positions is not None:
        vectors = padding_vectors(query_positions, key_positions, prefix)
    return Layout(
        batch=batch,
        time=time,
        keys=keys,
        heads=heads,
        group=query_heads // heads,
        head_size=head_size,
        window=min(window, keys),
        offset=keys - time,
        prefix=prefix,
        device=q.device,
        **vectors,
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
