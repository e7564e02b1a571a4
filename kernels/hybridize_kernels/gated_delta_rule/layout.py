"""Where chunks and segments lie: the tables that every kernel of the chunked form reads.

A sequence is cut into chunks of C tokens, each sequence from its own beginning, and into segments of whole chunks, one
a sequence or, where the heads alone would leave the GPU idle, several. Packed and equally long sequences differ in
nothing but these tables, which are made on the device: no length is ever asked for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..dispatch import current_stream, is_capturing


class Shape(NamedTuple):
    """Sizes of a call.

    Attributes:
        query_heads, key_heads, value_heads: each divides state_heads.
        state_heads: HS; one state `[key_size, value_size]` each.
    """

    query_heads: int
    key_heads: int
    value_heads: int
    state_heads: int
    key_size: int
    value_size: int


class Tables(NamedTuple):
    """int32 tables on the device; rows that nothing uses hold no tokens.

    Attributes:
        chunks: [NC, 2] first token among all B·T, number of tokens.
        segments: [NS, 6] first chunk, number of chunks, first token, end of the sequence's tokens, the sequence if
            this is its first segment else −1, the sequence if this is its last segment else −1.
        sequences: [N, 2] first segment, number of segments.
    """

    chunks: Tensor
    segments: Tensor
    sequences: Tensor


def tables(
    batch: int,
    time: int,
    cu_seqlens: Tensor | None,
    device: torch.device,
    *,
    chunk: int,
    segment_chunks: int | None = None,
) -> Tables:
    """The tables of B rows of T tokens, or of the sequences packed into one row.

    Args:
        chunk: tokens of a chunk.
        cu_seqlens: [N + 1] where the packed sequences begin and end, or None.
        segment_chunks: chunks of a segment; None: a sequence is one segment.
    """
    if cu_seqlens is None:
        return _equal(batch, time, device, chunk, segment_chunks)
    # A graph follows the lengths that it is replayed with. Nobody counts the changes of an inference tensor.
    if is_capturing(device) or cu_seqlens.is_inference():
        return _packed(cu_seqlens, time, device, chunk, segment_chunks)
    # The layers of a model are all called with the same tensor.
    known: dict[tuple[Any, ...], Tables] = _known.setdefault(cu_seqlens, {})
    key = (cu_seqlens._version, time, device, chunk, segment_chunks, current_stream(device))
    made = known.get(key)
    if made is None:
        known.clear()
        made = known[key] = _packed(cu_seqlens, time, device, chunk, segment_chunks)
    return made


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def most_chunks(num_sequences: int, time: int, packed: bool, chunk: int) -> int:
    """Rows of the table of chunks: what there is, or where only the device knows, the most there can be."""
    # A packed sequence wastes less than one chunk.
    return time // chunk + num_sequences if packed else num_sequences * -(-time // chunk)


def most_segments(num_sequences: int, time: int, packed: bool, chunk: int, segment_chunks: int | None) -> int:
    """Rows of the table of segments."""
    if segment_chunks is None:
        return num_sequences
    if packed:
        return num_sequences + most_chunks(num_sequences, time, packed, chunk) // segment_chunks
    chunks = -(-time // chunk)
    return num_sequences * max(1, -(-chunks // segment_chunks))


def _packed(cu_seqlens: Tensor, time: int, device: torch.device, chunk: int, segment_chunks: int | None) -> Tables:
    num_sequences = cu_seqlens.numel() - 1
    # An end beyond the text would be written to.
    return _make(cu_seqlens.to(device).long().clamp(max=time), time, True, chunk, segment_chunks, num_sequences)


def _equal(batch: int, time: int, device: torch.device, chunk: int, segment_chunks: int | None) -> Tables:
    def make() -> Tables:
        ends = torch.arange(batch + 1, device=device) * time
        return _make(ends, time, False, chunk, segment_chunks, batch)

    shape = (batch, time, device, chunk, segment_chunks)
    of_streams = _of_streams(*shape)
    if not is_capturing(device):
        stream = current_stream(device)
        if stream not in of_streams:
            of_streams[stream] = make()
        return of_streams[stream]
    # A graph reads its tables for as long as it lives, so none that it was given is ever dropped. What was queued
    # before a capture is done when the graph is replayed; what is captured is not, and nobody else may be given it.
    if shape not in _captured:
        if not of_streams:
            return make()
        _captured[shape] = next(iter(of_streams.values()))
    return _captured[shape]


@lru_cache(maxsize=512)
def _of_streams(
    batch: int, time: int, device: torch.device, chunk: int, segment_chunks: int | None
) -> dict[int, Tables]:
    """The tables of one shape, by the stream they were made on: another would not wait for them."""
    return {}


_captured: dict[tuple[Any, ...], Tables] = {}


def _make(ends: Tensor, time: int, packed: bool, chunk: int, segment_chunks: int | None, num_sequences: int) -> Tables:
    max_chunks = most_chunks(num_sequences, time, packed, chunk)
    max_segments = most_segments(num_sequences, time, packed, chunk, segment_chunks)
    starts, ends = ends[:-1], ends[1:]
    counts = (ends - starts + chunk - 1) // chunk
    sequence, index, used = _pieces(counts, max_chunks)
    first = starts[sequence] + index * chunk
    tokens = torch.where(used, (ends[sequence] - first).clamp(0, chunk), 0)
    chunks = torch.stack((first, tokens), dim=1)

    size = 2**31 if segment_chunks is None else segment_chunks
    # A sequence without tokens has a segment too: its state passes through.
    segment_counts = ((counts + size - 1) // size).clamp(min=1)
    sequence, index, used = _pieces(segment_counts, max_segments)
    num_chunks = torch.where(used, (counts[sequence] - index * size).clamp(0, size), 0)
    is_last = index == segment_counts[sequence] - 1
    nowhere = torch.full_like(sequence, -1)
    segments = torch.stack(
        (
            (counts.cumsum(0) - counts)[sequence] + index * size,
            num_chunks,
            starts[sequence] + index * size * chunk,
            ends[sequence],
            torch.where(used & (index == 0), sequence, nowhere),
            torch.where(used & is_last, sequence, nowhere),
        ),
        dim=1,
    )
    sequences = torch.stack((segment_counts.cumsum(0) - segment_counts, segment_counts), dim=1)
    return Tables(chunks.int(), segments.int(), sequences.int())


def _pieces(counts: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `most` pieces, counts[n] of them the n-th sequence's: its sequence, its place there, and if there is one."""
    ends = counts.cumsum(0)
    ids = torch.arange(most, device=counts.device)
    sequence = torch.searchsorted(ends, ids, right=True)
    used = sequence < counts.numel()
    sequence = sequence.clamp(max=counts.numel() - 1)
    return sequence, torch.where(used, ids - (ends - counts)[sequence], 0), used
