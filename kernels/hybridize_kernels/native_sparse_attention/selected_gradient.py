"""The backward pass of the selected branch, and the sums with what the other branches give to queries, keys and
values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .combine import key_gradients, query_gradient
from .layout import FORCED, Layout
from .lists import lists_by_block
from .pair_gradient import pair_gradients
from .selected import head_groups
from .tiles import tiles_of


class Others(NamedTuple):
    """What the other branches give.

    Attributes:
        dq_window, dq_compressed: `[B, T, HQ, D]`. dk_window, dv_window: `[B, S, H, D]`.
        d_pooled: of the pooled keys and values, fp32 `[num_blocks, H, D]`, where they are made of k and v; else None.
        pooling: the weights `[BS, H, D]` by which they are; None: their mean.
    """

    dq_window: Tensor
    dq_compressed: Tensor
    dk_window: Tensor
    dv_window: Tensor
    d_pooled: Sequence[Tensor] | None
    pooling: tuple[Tensor, Tensor] | None


def selected_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_output: Tensor,
    rows: Tensor,
    words: Tensor,
    others: Others,
    layout: Layout,
    *,
    block_size: int,
    num_selected_blocks: int,
    scale: float,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of all branches.

    d_output: of the selected branch, rows: of `gate_gradients`, words: of `choose_blocks`; padded: as there.
    """
    (batch, time, query_heads, head_size), heads = q.shape, k.shape[2]
    group, tiles = query_heads // heads, tiles_of(q, heads, block_size)
    lists = lists_by_block(
        words,
        layout,
        batch=batch,
        time=time,
        most_slots=min(max(FORCED, num_selected_blocks), layout.most_blocks),
        block_size=block_size,
        entries_per_item=tiles.entries,
        padded=padded,
    )
    dq = torch.empty_like(q)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if padded:  # keys that belong to no block have no gradient
        dk.zero_()
        dv.zero_()
    groups = head_groups(heads, lists.entries.shape[1], group, head_size, q.element_size())
    at_a_time, items = len(groups[0]), lists.items.shape[1]
    dq_pairs = q.new_empty(at_a_time, lists.entries.shape[1], group, head_size)
    d_items = torch.empty(at_a_time, items, 2, block_size, head_size, dtype=torch.float32, device=q.device)
    for some in groups:
        pair_gradients(
            q,
            k,
            v,
            d_output,
            rows,
            lists,
            layout,
            dq_pairs,
            d_items,
            heads=some,
            block_size=block_size,
            scale=scale,
            entries_per_item=tiles.entries,
            tile=tiles.gradient,
        )
        query_gradient(dq_pairs, lists, others.dq_compressed, others.dq_window, dq, heads=some)
        key_gradients(
            d_items,
            lists,
            layout,
            others.d_pooled,
            others.pooling,
            (others.dk_window, others.dv_window),
            (dk, dv),
            heads=some,
            block_size=block_size,
        )
    return dq, dk, dv
