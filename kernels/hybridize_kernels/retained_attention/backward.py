"""The backward kernels: dq by blocks of queries, dk and dv by tiles of keys. All deterministic.

With p = exp(s − lse), dp = do·v and delta = o·do − d lse: ds = p (dp − delta), dq = scale ds k, dk = scale dsᵀ q,
dv = pᵀ do. A retained key's queries are split into parts, whose sums in fp32 the window's kernel adds to its own in
order, so that every key is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import Launch
from .forward import Strides, flags, list_pointers, sizes
from .key_gradient import key_kernel, part_kernel
from .layout import Geometry, Vectors, ceil_div
from .lists import ListPlan, RetainedLists
from .query_gradient import query_kernel
from .tiles import Tiles

PART_PROGRAMS = 16
"""Programs that share the key tiles of one part of the queries; each takes every so-manieth tile."""


class BackwardPlan:
    """The kernels for calls with the same geometry.

    Args:
        strides: of q, k, v and the output's gradient, with features side by side.
        score_strides: of the scores `[B, S, H]` whose gradient is asked for, or None.
        has_d_log_sum_exp: whether the log-sum-exp has a gradient, too.

    Attributes:
        query, part, key: the launches in their order; part is None where nothing can be retained.
        part_shape: of the partial gradients, or None.
    """

    def __init__(
        self,
        geometry: Geometry,
        lists: ListPlan | None,
        dtype: torch.dtype,
        strides: tuple[Strides, Strides, Strides, Strides],
        score_strides: tuple[int, ...] | None,
        scale: float,
        tiles: Tiles,
        *,
        has_d_log_sum_exp: bool,
    ) -> None:
        row_heads, tile = geometry.batch * geometry.heads, tiles.key
        self.part_shape: tuple[int, ...] | None = None
        numbers = (*[stride for x in strides for stride in x], scale, *sizes(geometry, lists))
        constants = flags(geometry, lists, dtype, strides)
        self.query = Launch(
            query_kernel,
            (ceil_div(geometry.time, tiles.query.rows // geometry.group), row_heads),
            numbers,
            {**constants, "HAS_D_LSE": has_d_log_sum_exp, **tiles.query.options()},
        )
        part_rows = 0
        self.part = None
        if lists is not None:
            part_rows = lists.part_rows
            self.part_shape = (geometry.batch, geometry.heads, part_rows, 2, geometry.head_size)
            programs = min(ceil_div(lists.width or geometry.keys, tile.keys), PART_PROGRAMS)
            self.part = Launch(
                part_kernel,
                (programs * lists.chunks, row_heads),
                (*numbers, part_rows, programs),
                {**constants, **tile.options()},
            )
        self.key = Launch(
            key_kernel,
            (ceil_div(geometry.keys, tile.keys), row_heads),
            (*numbers, part_rows, *(score_strides or (0, 0, 0))),
            {**constants, "HAS_SCORE": score_strides is not None, **tile.options()},
        )


def attend_backward(
    plan: BackwardPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    d_output: Tensor,
    d_log_sum_exp: Tensor | None,
    lists: RetainedLists | None,
    vectors: Vectors,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """dq, dk, dv, for a score `[B, S, H]` its gradient, ⟨dv, v⟩ where it is finite, and what is known of the rows.

    That is fp32, in the order `[2, B, H, T, G]`: their log-sum-exps in base 2, +inf of what sees nothing, and deltas.
    """
    device = q.device
    dq = torch.empty(q.shape, dtype=q.dtype, device=device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=device) for _ in range(2))
    d_score = None if score is None else torch.empty(score.shape, dtype=score.dtype, device=device)
    rows = torch.empty((2, *log_sum_exp.shape), dtype=torch.float32, device=device)
    d_lse = log_sum_exp if d_log_sum_exp is None else d_log_sum_exp
    plan.query(q, k, v, output, log_sum_exp, d_output, d_lse, rows, dq, *list_pointers(q, lists, vectors))
    parts, exits, before, part_row = rows, q, q, q
    if lists is not None and plan.part is not None and plan.part_shape is not None:
        parts = torch.empty(plan.part_shape, dtype=torch.float32, device=device)
        exits, before = lists.exit, lists.before
        part_row = q if lists.part_row is None else lists.part_row
        plan.part(
            q,
            k,
            v,
            d_output,
            rows,
            parts,
            q if vectors.query_start is None else vectors.query_start,
            lists.walked,
            exits,
            before,
            q if lists.chunk_size is None else lists.chunk_size,
            part_row,
        )
    plan.key(
        q,
        k,
        v,
        d_output,
        rows,
        parts,
        dk,
        dv,
        rows if score is None else score,
        rows if d_score is None else d_score,
        q if vectors.key_end is None else vectors.key_end,
        exits,
        before,
        part_row,
    )
    return dq, dk, dv, d_score, rows
