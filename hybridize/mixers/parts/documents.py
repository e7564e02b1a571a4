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
