"""Where chunks and segments lie: the tables that every kernel of the chunked form reads.

A sequence is cut into chunks of C tokens, each sequence from its own beginning, and into segments of whole chunks, one
a sequence or, where the heads alone would leave the GPU idle, several. Packed and equally long sequences differ in
nothing but these tables, which are made on the device: no length is ever asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from ..kept import tables_of_bounds, tables_of_sizes
from ..launch import launch

ROWS = 64
"""Rows of a table that a program of `tables_kernel` makes, and sequences that it looks at together."""
WHOLE = 2**30
"""Chunks of a segment that is all of its sequence."""


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
        return tables_of_sizes(_equal, device, batch, time, chunk, segment_chunks)
    return tables_of_bounds(_packed, cu_seqlens, device, time, chunk, segment_chunks)


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


def _packed(cu_seqlens: Tensor, device: torch.device, time: int, chunk: int, segment_chunks: int | None) -> Tables:
    return _make(cu_seqlens.to(device), time, True, chunk, segment_chunks)


def _equal(device: torch.device, batch: int, time: int, chunk: int, segment_chunks: int | None) -> Tables:
    ends = torch.arange(batch + 1, device=device) * time
    return _make(ends, time, False, chunk, segment_chunks)


def _make(ends: Tensor, time: int, packed: bool, chunk: int, segment_chunks: int | None) -> Tables:
    num_sequences = ends.numel() - 1
    num_tokens = time if packed else num_sequences * time
    num_chunks = most_chunks(num_sequences, time, packed, chunk)
    num_segments = most_segments(num_sequences, time, packed, chunk, segment_chunks)
    sizes = ((num_chunks, 2), (num_segments, 6), (num_sequences, 2))
    made = Tables(*(torch.empty(size, dtype=torch.int32, device=ends.device) for size in sizes))
    if num_sequences:
        launch(
            tables_kernel,
            (cdiv(max(num_chunks, num_segments), ROWS),),
            (ends.contiguous(), *made),
            (num_sequences, num_chunks, num_segments, segment_chunks or WHOLE, num_tokens),
            C=chunk,
            ROWS=ROWS,
            num_warps=4,
        )
    return made


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_sequences", "num_chunks", "num_segments", "segment_chunks", "num_tokens"]
)
def tables_kernel(
    ends_ptr,  # [N + 1]
    chunks_ptr,  # [NC, 2]
    segments_ptr,  # [NS, 6]
    sequences_ptr,  # [N, 2]
    num_sequences,
    num_chunks,
    num_segments,
    segment_chunks,
    num_tokens,
    C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program makes ROWS rows of the chunks and of the segments, for which it counts those of every sequence."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Of the sequence that a row belongs to: its number, how many rows are before its own, and for segments, chunks.
    sequence = tl.zeros((ROWS,), tl.int32)
    chunks_before = tl.zeros((ROWS,), tl.int32)
    segment_sequence = tl.zeros((ROWS,), tl.int32)
    segments_before = tl.zeros((ROWS,), tl.int32)
    segment_chunks_before = tl.zeros((ROWS,), tl.int32)
    all_chunks, all_segments = 0, 0
    for first in range(0, num_sequences, ROWS):
        n = first + tl.arange(0, ROWS)
        _, _, chunks, segments = counts_of(ends_ptr, n, num_sequences, num_tokens, segment_chunks, C)
        chunk_ends = all_chunks + tl.cumsum(chunks)
        segment_ends = all_segments + tl.cumsum(segments)
        passed = (n < num_sequences)[None, :] & (chunk_ends[None, :] <= row[:, None])
        sequence += tl.sum(passed.to(tl.int32), 1)
        chunks_before = tl.maximum(chunks_before, tl.max(tl.where(passed, chunk_ends[None, :], 0), 1))
        passed = (n < num_sequences)[None, :] & (segment_ends[None, :] <= row[:, None])
        segment_sequence += tl.sum(passed.to(tl.int32), 1)
        segments_before = tl.maximum(segments_before, tl.max(tl.where(passed, segment_ends[None, :], 0), 1))
        segment_chunks_before = tl.maximum(segment_chunks_before, tl.max(tl.where(passed, chunk_ends[None, :], 0), 1))
        if tl.program_id(0) == 0:
            tl.store(sequences_ptr + n * 2, segment_ends - segments, mask=n < num_sequences)
            tl.store(sequences_ptr + n * 2 + 1, segments, mask=n < num_sequences)
        all_chunks += tl.sum(chunks)
        all_segments += tl.sum(segments)

    # A row that nothing uses is a place in the text, too: that of the first token.
    start, end, _, _ = counts_of(ends_ptr, sequence, num_sequences, num_tokens, segment_chunks, C)
    token = start + tl.where(row < all_chunks, row - chunks_before, 0) * C
    tl.store(chunks_ptr + row * 2, token, mask=row < num_chunks)
    tl.store(chunks_ptr + row * 2 + 1, tl.minimum(tl.maximum(end - token, 0), C), mask=row < num_chunks)

    sequence = segment_sequence
    start, end, chunks, segments = counts_of(ends_ptr, sequence, num_sequences, num_tokens, segment_chunks, C)
    used = row < all_segments
    index = tl.where(used, row - segments_before, 0)
    at, is_row = segments_ptr + row * 6, row < num_segments
    tl.store(at, tl.where(used, segment_chunks_before + index * segment_chunks, 0), mask=is_row)
    tl.store(at + 1, tl.minimum(chunks - index * segment_chunks, segment_chunks), mask=is_row)
    tl.store(at + 2, start + index * segment_chunks * C, mask=is_row)
    tl.store(at + 3, end, mask=is_row)
    tl.store(at + 4, tl.where(used & (index == 0), sequence, -1), mask=is_row)
    tl.store(at + 5, tl.where(used & (index == segments - 1), sequence, -1), mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def counts_of(ends_ptr, sequence, num_sequences, num_tokens, segment_chunks, C: tl.constexpr):
    """Begin and end of sequences, their chunks and segments; zeros for one beyond the last."""
    is_one = sequence < num_sequences
    # An end beyond the text would be written to.
    start = tl.minimum(tl.load(ends_ptr + sequence, mask=is_one, other=0), num_tokens).to(tl.int32)
    end = tl.minimum(tl.load(ends_ptr + sequence + 1, mask=is_one, other=0), num_tokens).to(tl.int32)
    chunks = (end - start + C - 1) // C
    # A sequence without tokens has a segment too: its state passes through.
    segments = tl.maximum((chunks + segment_chunks - 1) // segment_chunks, 1)
    return start, end, tl.where(is_one, chunks, 0), tl.where(is_one, segments, 0)
