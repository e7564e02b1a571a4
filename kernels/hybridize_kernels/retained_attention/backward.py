"""The backward kernels: dq by blocks of queries, dk and dv by tiles of keys. All deterministic.

With p = exp(s − lse), dp = do·v and delta = o·do − d lse: ds = p (dp − delta), dq = scale ds k, dk = scale dsᵀ q,
dv = pᵀ do. A retained key's queries are split into parts, whose sums in fp32 the window's
kernel adds to its own in order, so that every key is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .forward import flags, list_pointers, list_sizes
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
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    do_strides = d_output.stride()[:3]
    constants = flags(lists, layout, q, k, v, d_output)
    with torch.cuda.device_of(q):
        query_kernel[(ceil_div(time, tiles.query.rows // layout.group) * batch * heads,)](
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
            *strides,
            *do_strides,
            scale,
            *list_sizes(lists, layout),
            *constants,
            HAS_D_LSE=d_log_sum_exp is not None,
            **tiles.query.options(),
        )
        tile = tiles.key
        parts = delta
        if lists is not None:
            parts = torch.empty(
                batch, heads, lists.part_rows, 2, layout.head_size, dtype=torch.float32, device=q.device
            )
            columns = lists.columns if lists.chunk_columns is None else lists.chunk_columns
            longest = columns.shape[-1]
            programs = min(ceil_div(longest, tile.keys), PART_PROGRAMS)
            part_kernel[(programs * ceil_div(time, lists.chunk), batch * heads)](
                q,
                k,
                v,
                log_sum_exp,
                d_output,
                delta,
                parts,
                q if layout.query_start is None else layout.query_start,
                columns,
                lists.exit,
                lists.before,
                q if lists.chunk_size is None else lists.chunk_size,
                q if lists.part_row is None else lists.part_row,
                *strides,
                *do_strides,
                scale,
                *list_sizes(lists, layout),
                lists.part_rows,
                programs,
                *constants,
                **tile.options(),
            )
        key_kernel[(ceil_div(keys, tile.keys), batch * heads)](
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
            q if lists is None else lists.exit,
            q if lists is None else lists.before,
            q if lists is None or lists.part_row is None else lists.part_row,
            *strides,
            *do_strides,
            scale,
            *list_sizes(lists, layout),
            0 if lists is None else lists.part_rows,
            *((0, 0, 0) if score is None else score.stride()),
            *constants,
            HAS_SCORE=score is not None,
            **tile.options(),
        )
    return dq, dk, dv, d_score
