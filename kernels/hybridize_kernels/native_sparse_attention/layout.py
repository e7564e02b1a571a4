"""Where documents, tiles of queries and blocks of keys lie: the tables that every kernel reads.

A document is a row of the batch, or one of the texts packed into a row. Its queries are the last of its keys. Positions
count in each document; a tile is TILE consecutive positions of queries, a block `block_size` consecutive positions of
keys, both aligned to position 0. Padding, packing and earlier context differ in nothing but these tables, which are
made on the device: no length is ever asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import tables_of_bounds, tables_of_sizes

TILE = 32
"""Positions of a tile of queries: as many as a word of membership has bits."""


FORCED = 3
"""The first, the current and the previous block, which are chosen whatever their score."""


class Layout(NamedTuple):
    """int32 tables on the device; rows that nothing uses have no queries and no tokens.

    Attributes:
        tiles: `[num_tiles, 8]`. Of a tile: row of the batch; token of its first position (may lie before `low`); first
            token `low` and end `high` of its document's queries; its first position; token of the key at position 0;
            number of the document's block 0 among all blocks; keys of the document.
        blocks: `[num_blocks, 9]`. Of a block: row of the batch; token of its first key; how many keys it has; its
            number in the document; number of the tile of position 0 (where earlier context has no queries, one that is
            not there); end of the document's tiles; token of the query at position 0 (may be negative); `low`; `high`.
        most_blocks: of one document, at most. row_blocks: of each row of the batch in the table, or all of them.
    """

    tiles: Tensor
    blocks: Tensor
    most_blocks: int
    row_blocks: int


class Documents(NamedTuple):
    """int64 vectors `[N]`, one entry a document.

    Attributes:
        row: of the batch. key: token of its first key. length: number of its keys. low, high: its queries' tokens.
    """

    row: Tensor
    key: Tensor
    length: Tensor
    low: Tensor
    high: Tensor


def padded_documents(num_padding: Tensor, time: int) -> Documents:
    """Rows of T tokens of which the first num_padding `[B]` are padding."""
    num_padding = num_padding.long()
    end = torch.full_like(num_padding, time)
    return Documents(torch.arange(len(end), device=end.device), num_padding, end - num_padding, num_padding, end)


def cached_documents(num_padding: Tensor, lengths: Tensor, time: int) -> Documents:
    """Keys by position, `lengths` `[B]` of them in a row; queries are the last of them, after num_padding `[B]`."""
    low, lengths = num_padding.long(), lengths.long()
    end = torch.full_like(low, time)
    return Documents(torch.arange(len(end), device=end.device), torch.zeros_like(low), lengths, low, end)


def packed_documents(cu_seqlens: Tensor, time: int) -> Documents:
    """Texts in one row, with bounds `[N + 1]` from 0 to T."""
    bounds = cu_seqlens.long().clamp(0, time)
    begin, end = bounds[:-1], bounds[1:]
    return Documents(torch.zeros_like(begin), begin, end - begin, begin, end)


def equal_layout(batch: int, time: int, keys: int, block_size: int, device: torch.device) -> Layout:
    """B rows of S keys, of which the last T have queries."""
    return tables_of_sizes(_equal, device, batch, time, keys, block_size)


def packed_layout(cu_seqlens: Tensor, time: int, block_size: int, device: torch.device) -> Layout:
    """Texts in one row of T tokens, with bounds `[N + 1]` from 0 to T."""
    return tables_of_bounds(_packed, cu_seqlens, device, time, block_size)


def _packed(cu_seqlens: Tensor, device: torch.device, time: int, block_size: int) -> Layout:
    number = len(cu_seqlens) - 1
    documents = packed_documents(cu_seqlens.to(device), time)
    num_blocks = time // block_size + number
    layout = layout_of(documents, block_size, time // TILE + number, num_blocks)
    # No document is longer than the row.
    return layout._replace(most_blocks=min(num_blocks, _ceil_div(time, block_size)))


def _equal(device: torch.device, batch: int, time: int, keys: int, block_size: int) -> Layout:
    ones = torch.ones(batch, dtype=torch.long, device=device)
    row = torch.arange(batch, device=device)
    documents = Documents(row, ones * 0, ones * keys, ones * 0, ones * time)
    num_tiles = _ceil_div(keys, TILE) - (keys - time) // TILE
    num_blocks = _ceil_div(keys, block_size)
    return layout_of(documents, block_size, batch * num_tiles, batch * num_blocks, num_tiles, row_blocks=num_blocks)


def layout_of(
    documents: Documents,
    block_size: int,
    num_tiles: int,
    num_blocks: int,
    row_tiles: int | None = None,
    *,
    row_blocks: int | None = None,
) -> Layout:
    """The tables.

    Args:
        num_tiles, num_blocks: rows of the tables, at least as many as are used.
        row_tiles, row_blocks: numbers that each document has, used or not; None: as many as it uses.
    """
    row, key, length, low, high = documents
    zero = high - length  # token of the query at position 0
    first_tile = torch.where(high > low, (low - zero).clamp(min=0) // TILE, 0)
    used_tiles = torch.where(high > low, _ceil_div_tensor(length, TILE) - first_tile, 0)
    used_blocks = _ceil_div_tensor(length, block_size)
    tile_base, tile_document, tile = _rows(used_tiles, num_tiles, row_tiles)
    block_base, block_document, block = _rows(used_blocks, num_blocks, row_blocks)

    d = tile_document
    is_one = tile < used_tiles[d]
    position = (first_tile[d] + tile) * TILE
    end = torch.where(is_one, high[d], low[d])
    tiles = torch.stack((row[d], zero[d] + position, low[d], end, position, key[d], block_base[d], length[d]), 1)

    d = block_document
    first = block * block_size
    tokens = torch.where(block < used_blocks[d], (length[d] - first).clamp(0, block_size), 0)
    of_zero = tile_base - first_tile
    tile_end = tile_base + used_tiles
    blocks = torch.stack((row[d], key[d] + first, tokens, block, of_zero[d], tile_end[d], zero[d], low[d], high[d]), 1)
    most = row_blocks if row_blocks is not None else num_blocks
    return Layout(tiles.to(torch.int32).contiguous(), blocks.to(torch.int32).contiguous(), most, most)


def _rows(used: Tensor, total: int, each: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows of a table: where each document's begin `[N]`; the document and the number in it `[total]`."""
    index = torch.arange(total, device=used.device)
    if each is not None:
        base = torch.arange(len(used), device=used.device) * each
        return base, index // max(each, 1), index % max(each, 1)
    ends = used.cumsum(0)
    document = torch.searchsorted(ends, index, right=True).clamp(max=len(used) - 1)
    base = ends - used
    return base, document, index - base[document]


def power_of_two(number: int) -> int:
    """The least power of two that is at least a number above zero."""
    return 1 << (number - 1).bit_length()


def _ceil_div(number: int, size: int) -> int:
    return -(-number // size)


def _ceil_div_tensor(number: Tensor, size: int) -> Tensor:
    return (number + size - 1) // size
