"""Documents packed into one row: where each token stands in its own. Nothing here asks the device for a number.

`cu_seqlens` [N + 1] are the bounds of N documents that lie side by side in a row of T tokens, from 0 to T.
"""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION_BITS = 20
"""Sums are taken in fixed point: whole numbers add up to the same bits in any order, which a parallel sum of floating
point does not promise, and no long sum rounds."""
LARGEST = 2.0**13


def document_of_tokens(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64, the number of the document that each token belongs to."""
    token = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:-1], token, right=True)


def document_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[1, T] int64, the position of each token in its document."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    return (token - cu_seqlens[document_of_tokens(cu_seqlens, num_tokens)])[None]


def document_counts(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Whole numbers [T, H] (or bool) -> [N, H] int64, their sums over each document."""
    before = torch.zeros(x.shape[1], 1, dtype=torch.int64, device=x.device)
    # Time along the rows of memory: so a scan has the whole text to share out, not a few columns.
    running = torch.cat((before, x.t().contiguous().cumsum(1, dtype=torch.int64)), dim=1)
    first, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    return (running[:, end] - running[:, first]).t()


def document_sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T, H] of numbers up to 2**13 -> [N, H] float32, their sums over each document, of numbers rounded to 2**-20."""
    step = 2.0**-FRACTION_BITS
    fixed = (x.double().clamp(-LARGEST, LARGEST) / step).round().long()
    return (document_counts(fixed, cu_seqlens).double() * step).float()


def sums_of_texts(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, H] (or bool) -> [B, 1 | T, H], for every token the sum over its text: its document, or the row."""
    if cu_seqlens is None:
        return x.sum(1, keepdim=True)
    sums = document_counts(x[0], cu_seqlens) if x.dtype == torch.bool else document_sums(x[0], cu_seqlens)
    return sums[document_of_tokens(cu_seqlens, x.shape[1])][None]


def largest_of_texts(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, H], 0 or more -> [B, 1 | T, H], for every token the largest of its text."""
    if cu_seqlens is None:
        return x.amax(1, keepdim=True)
    document = document_of_tokens(cu_seqlens, x.shape[1])[:, None].expand_as(x[0])
    largest = x.new_zeros(len(cu_seqlens) - 1, x.shape[2]).scatter_reduce(0, document, x[0], "amax")
    return largest.gather(0, document)[None]


def kth_largest_of_texts(x: Tensor, k: int, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, H] -> [B, 1 | T, H], for every token the k-th largest of its text; -inf if that has fewer tokens."""
    if cu_seqlens is None:
        if k > x.shape[1]:
            return x.new_full((x.shape[0], 1, x.shape[2]), -torch.inf)
        return x.topk(k, dim=1).values[:, -1:]
    document = document_of_tokens(cu_seqlens, x.shape[1])
    value, token = x[0].sort(dim=0, descending=True)
    # Those of one document side by side, in this order.
    place = document[token].sort(dim=0, stable=True).indices
    wanted = cu_seqlens[document] + k - 1
    inside = wanted < cu_seqlens[document + 1]
    kth = value.gather(0, place)[wanted.clamp(max=x.shape[1] - 1)]
    return kth.where(inside[:, None], -torch.inf)[None]
