"""Keys and values of their own for query heads that shared them in the teacher."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hybridize.families.base import AttentionView


def with_own_keys(view: AttentionView) -> AttentionView:
    """The same attention with a key and a value head for each query head; what the teacher computes does not change.

    Whole heads are repeated, each next to its copies, as the teacher's query heads n·G..n·G + G − 1 read key head n. A
    norm over the head is one for all heads and stays. Where no heads are shared, `view` itself is returned.
    """
    geometry = view.geometry
    if geometry.group_size == 1:
        return view

    def repeated(rows: Tensor) -> nn.Parameter:
        heads = rows.detach().unflatten(0, (geometry.num_key_heads, geometry.head_size))
        return nn.Parameter(heads.repeat_interleave(geometry.group_size, dim=0).flatten(0, 1))

    def expanded(linear: nn.Linear) -> nn.Linear:
        with torch.device("meta"):
            wide = nn.Linear(linear.in_features, linear.out_features * geometry.group_size, bias=False)
        wide.weight = repeated(linear.weight)
        if linear.bias is not None:
            wide.bias = repeated(linear.bias)
        return wide

    wider = replace(geometry, num_key_heads=geometry.num_query_heads)
    return replace(view, k_proj=expanded(view.k_proj), v_proj=expanded(view.v_proj), geometry=wider)
