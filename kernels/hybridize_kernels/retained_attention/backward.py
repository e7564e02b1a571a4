"""The backward kernels: dq by blocks of queries, dk and dv by tiles of keys. All deterministic.

With p = exp(s − lse), dp = do·v and delta = o·do − d lse: ds = p (dp − delta), dq = scale ds k, dk = scale dsᵀ q,
dv = pᵀ do. A retained key's queries are split into parts, whose sums in fp32 the window's
kernel adds to its own in order, so that every key is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import launch
from .forward import flags, list_pointers, list_sizes, strides
from .key_gradient import key_kernel, part_kernel
from .layout import Layout, ceil_div
from .lists import RetainedLists
from .query_gradient import query_kernel
from .tiles import Tiles

PART_PROGRAMS = 16
"""Programs that share the key tiles of one part of the queries; each takes every so-manieth tile."""


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    d_output: Tensor,
    d_log_sum_exp: Tensor | None,
    lists: RetainedLists | None,
    layout: Layout,
    scale: float,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, and for a score `[B, S, H]` its gradient, ⟨dv, v⟩ where it is finite."""
    batch, time, heads, keys = layout.batch, layout.time, layout.heads, layout.keys
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    d_score = None if score is None else torch.empty(score.shape, dtype=score.dtype, device=q.device)
    delta = torch.empty_like(log_sum_exp)
    numbers = (*strides(q, k, v, d_output), scale, *list_sizes(lists, layout))
    constants = flags(lists, layout, q, k, v, d_output)
    with torch.cuda.device_of(q):
        launch(
            query_kernel,
            (ceil_div(time, tiles.query.rows // layout.group), batch * heads),
            (
                q,
                k,
                v,
                output,
                log_sum_exp,
                d_output,
                log_sum_exp if d_log_sum_exp is None else d_log_sum_exp,
                delta,
                dq,
                *list_pointers(q, lists, layout),
            ),
            numbers,
            **constants,
            HAS_D_LSE=d_log_sum_exp is not None,
            **tiles.query.options(),
        )
        tile = tiles.key
        parts, part_rows = delta, 0
        exits = before = part_row = q
        if lists is not None:
            part_rows = lists.part_rows
            parts = torch.empty(batch, heads, part_rows, 2, layout.head_size, dtype=torch.float32, device=q.device)
            exits, before = lists.exit, lists.before
            part_row = q if lists.part_row is None else lists.part_row
            columns = lists.columns if lists.chunk_columns is None else lists.chunk_columns
            programs = min(ceil_div(columns.shape[-1], tile.keys), PART_PROGRAMS)
            launch(
                part_kernel,
                (programs * ceil_div(time, lists.chunk), batch * heads),
                (
                    q,
                    k,
                    v,
                    log_sum_exp,
                    d_output,
                    delta,
                    parts,
                    q if layout.query_start is None else layout.query_start,
                    columns,
                    exits,
                    before,
                    q if lists.chunk_size is None else lists.chunk_size,
                    part_row,
                ),
                (*numbers, part_rows, programs),
                **constants,
                **tile.options(),
            )
        launch(
            key_kernel,
            (ceil_div(keys, tile.keys), batch * heads),
            (
                q,
                k,
                v,
                log_sum_exp,
                d_output,
                delta,
                parts,
                dk,
                dv,
                delta if score is None else score,
                delta if d_score is None else d_score,
                q if layout.key_end is None else layout.key_end,
                exits,
                before,
                part_row,
            ),
            (*numbers, part_rows, *((0, 0, 0) if score is None else score.stride())),
            **constants,
            HAS_SCORE=score is not None,
            **tile.options(),
        )
    return dq, dk, dv, d_score
