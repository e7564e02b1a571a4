"""The ways to say where tokens are, each turned into the tables of `layout` and the window branch's own terms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..retained_attention import retained_attention
from .layout import (
    TILE,
    Layout,
    cached_documents,
    equal_layout,
    layout_of,
    packed_layout,
    padded_documents,
)


class Places(NamedTuple):
    """Attributes:
    layout: the tables.
    order, back: `[B, T]` what brings a row's real tokens to its right end, and what undoes it; None: they are there.
    query_positions: `[B, T]` after that; None: nothing is padding, or texts are packed.
    key_lengths: `[B]`, where keys lie by position. cu_seqlens: `[N + 1]`, where texts are packed.
    time: T. offset: position of the first query where no tensor says it. row_blocks: blocks of a row's table.
    """

    layout: Layout
    order: Tensor | None = None
    back: Tensor | None = None
    query_positions: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    time: int = 0
    offset: int = 0
    row_blocks: int = 0

    @property
    def padded(self) -> bool:
        """Whether there may be tokens that belong to no document."""
        return self.order is not None

    def sorted(self, x: Tensor) -> Tensor:
        """x `[B, T, ...]` in the kernels' order."""
        return x if self.order is None else take(x, self.order)

    def unsorted(self, x: Tensor) -> Tensor:
        return x if self.back is None else take(x, self.back)

    def with_dense(self, output: Tensor, q: Tensor, k: Tensor, v: Tensor, *, below: int, scale: float) -> Tensor:
        """The output with that of full causal attention at positions below `below`, which a window of so many tokens
        is."""
        if self.query_positions is None and self.cu_seqlens is None:
            queries = min(max(below - self.offset, 0), q.shape[1])
            if queries == 0:
                return output
            first, seen = q[:, :queries], self.offset + queries
            dense = retained_attention(first, k[:, :seen], v[:, :seen], window=below, scale=scale)
            return torch.cat((dense, output[:, queries:]), dim=1)
        k, v, _, order = self.of_windows(q, k, v, below)
        dense = retained_attention(q, k, v, window=below, scale=scale, **order)
        return torch.where((self._positions() < below)[..., None, None], dense, output)

    def of_windows(
        self, q: Tensor, k: Tensor, v: Tensor, window: int
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
        """The keys and values that lie in some query's window, their tokens `[B, n]` among all (−1: none; None: all are
        left), and where those that are left lie, in the terms of `retained_attention`."""
        if self.cu_seqlens is not None:
            return k, v, None, {"cu_seqlens": self.cu_seqlens}
        positions = self.query_positions
        if positions is None:
            return k, v, None, {}
        tokens = None
        if self.key_lengths is not None:
            width = min(k.shape[1], window - 1 + q.shape[1])
            tokens = self.key_lengths.long()[:, None] - width + torch.arange(width, device=q.device)
            tokens = tokens.clamp(min=-1)
            k, v = take(k, tokens.clamp(min=0)), take(v, tokens.clamp(min=0))
        key_positions = positions if tokens is None else tokens
        return k, v, tokens, {"query_positions": positions, "key_positions": key_positions, "ordered_from": 0}

    def _positions(self) -> Tensor:
        """`[B, T]`, −1 for padding, where some tensor says them."""
        if self.cu_seqlens is None:
            assert self.query_positions is not None
            return self.query_positions
        column = torch.arange(self.time, device=self.cu_seqlens.device)
        document = torch.searchsorted(self.cu_seqlens[1:].contiguous(), column, right=True)
        return (column - self.cu_seqlens[document.clamp(max=len(self.cu_seqlens) - 2)])[None]

    def of_blocks(self, x: Tensor) -> Tensor:
        """Given pooled keys or values `[B, blocks, H, D]` as the tables count blocks: `[num_blocks, H, D]`."""
        missing = self.row_blocks - x.shape[1]
        x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing > 0 else x[:, : self.row_blocks]
        return x.reshape(-1, *x.shape[2:]).contiguous()

    def of_rows(self, x: Tensor, shape: torch.Size) -> Tensor:
        """What `of_blocks` turned, turned back."""
        x = x.view(shape[0], self.row_blocks, *shape[2:])
        missing = shape[1] - self.row_blocks
        return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing > 0 else x[:, : shape[1]]


def places_of(
    q: Tensor,
    k: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    block_size: int,
) -> Places:
    """See `hybridize_kernels.native_sparse_attention` for what is given."""
    (batch, time), keys, device = q.shape[:2], k.shape[1], q.device
    row_blocks = -(-keys // block_size)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(device)
        layout = packed_layout(cu_seqlens, time, block_size, device)
        return Places(layout, cu_seqlens=cu_seqlens, time=time)
    if query_positions is None:
        layout = equal_layout(batch, time, keys, block_size, device)
        return Places(layout, time=time, offset=keys - time, row_blocks=row_blocks)
    order = (query_positions >= 0).to(torch.uint8).argsort(dim=1, stable=True)
    query_positions = query_positions.gather(1, order)
    num_padding = (query_positions < 0).sum(1)
    if key_lengths is not None:
        documents, tiles = cached_documents(num_padding, key_lengths, time), (time - 1) // TILE + 2
    else:
        documents, tiles = padded_documents(num_padding, time), -(-time // TILE)
    layout = layout_of(documents, block_size, batch * tiles, batch * row_blocks, tiles, row_blocks=row_blocks)
    return Places(layout, order, order.argsort(dim=1), query_positions, key_lengths, time=time, row_blocks=row_blocks)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x `[B, T, ...]` at index `[B, T]`."""
    return x.gather(1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
