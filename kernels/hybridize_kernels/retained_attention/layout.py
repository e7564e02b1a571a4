"""How queries and keys lie in memory, in the terms of the kernels: columns and rows instead of positions.

Keys lie in order of position. Query row i belongs to key column i + offset, and sees the columns of its document in
`(i + offset − window, i + offset]`. Padding, packed documents and the kept part of an earlier cache are three int32
vectors; where there is none of them the kernels do not read any.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def ceil_div(number: int, size: int) -> int:
    """Blocks of a size that hold a number of things. (Triton's own is slow outside a kernel.)"""
    return -(-number // size)


def power_of_two(number: int) -> int:
    """The least power of two that is at least a number above zero."""
    return 1 << (number - 1).bit_length()


class Geometry(NamedTuple):
    """A call's sizes.

    Attributes:
        offset: column of query row 0. prefix: columns before this one are outside every window.
        padded: whether there are vectors.
    """

    batch: int
    time: int
    keys: int
    heads: int
    group: int
    head_size: int
    window: int
    offset: int
    prefix: int
    padded: bool = False


class Vectors(NamedTuple):
    """Where rows do not begin at column 0, or end before the last; all int32.

    Attributes:
        query_start: `[B, T]` first column that a query may see in its window, `keys` for padding; None: `prefix`.
        key_start: `[B, S]` first column of the key's document, `keys` for padding; None: 0.
        key_end: `[B, S]` row from which no query sees the key, as its document is over; None: `time`.
        document: `[S]` the key's document, where documents are packed.
    """

    query_start: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    document: Tensor | None = None


def padding_vectors(query_positions: Tensor, key_positions: Tensor, prefix: int) -> Vectors:
    """The vectors of rows with padding at their left.

    Args:
        query_positions: `[B, T]`, −1 for padding. key_positions: `[B, S]` or `[B, S, H]`; of the columns from `prefix`
            on −1 is padding.
    """
    positions = key_positions if key_positions.ndim == 2 else key_positions[..., 0]
    keys, time = positions.shape[1], query_positions.shape[1]
    column = torch.arange(keys, dtype=torch.int32, device=positions.device)
    padding = prefix + (positions[:, prefix:] < 0).sum(1, dtype=torch.int32)[:, None]  # [B, 1]
    real = (column >= padding) | (column < prefix)
    start = padding.expand(query_positions.shape).masked_fill(query_positions < 0, keys).to(torch.int32)
    return Vectors(
        query_start=start.contiguous(),
        key_start=torch.where(real, torch.where(column < prefix, 0, padding), keys).to(torch.int32),
        key_end=torch.where(real, time, 0).to(torch.int32),
    )


def document_vectors(cu_seqlens: Tensor, tokens: int) -> Vectors:
    """The vectors of documents packed into one row of `tokens` columns; cu_seqlens: `[N + 1]`, from 0 to tokens."""
    column = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    bounds = cu_seqlens.to(torch.int32)
    document = torch.searchsorted(bounds[1:].contiguous(), column, right=True, out_int32=True)
    document = document.clamp(max=len(bounds) - 2)
    start, end = bounds[:-1][document], bounds[1:][document]
    return Vectors(query_start=start[None], key_start=start[None], key_end=end[None], document=document)
