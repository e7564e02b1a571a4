"""The tables of the chunked gated delta rule: where chunks and segments of sequences lie."""

from __future__ import annotations

from importlib import import_module
from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridize_kernels.gated_delta_rule import layout
from hybridize_kernels.gated_delta_rule.layout import Tables, tables

kept = import_module("hybridize_kernels.kept")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
any_lengths = st.lists(st.one_of(st.integers(0, 70), st.just(0), st.sampled_from([8, 16, 64])), min_size=1, max_size=6)
any_chunk = st.sampled_from([8, 16])
any_segment = st.one_of(st.none(), st.integers(1, 4))


def packed(lengths: list[int], chunk: int, segment_chunks: int | None) -> Tables:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    return tables(1, sum(lengths), ends, DEVICE, chunk=chunk, segment_chunks=segment_chunks)


def require_right(made: Tables, lengths: list[int], chunk: int, segment_chunks: int | None) -> None:
    """Every token is in one chunk of its sequence, and segments cover the chunks in order."""
    chunks, segments, sequences = made.chunks.tolist(), made.segments.tolist(), made.sequences.tolist()
    expected = [
        [first, min(chunk, end - first)]
        for begin, end in pairwise([0, *accumulate(lengths)])
        for first in range(begin, end, chunk)
    ]
    used, unused = chunks[: len(expected)], chunks[len(expected) :]
    assert used == expected
    assert all(num_tokens == 0 for _, num_tokens in unused)

    assert len(sequences) == len(lengths)
    ends = [0, *accumulate(lengths)]
    next_chunk = next_segment = 0
    for n, (first_segment, count) in enumerate(sequences):
        assert first_segment == next_segment
        assert count >= 1, "a sequence without tokens hands its state on, too"
        assert segment_chunks is not None or count == 1
        next_segment += count
        for m, row in enumerate(segments[first_segment:next_segment]):
            first_chunk, num_chunks, first_token, end, if_first, if_last = row
            assert first_chunk == next_chunk
            assert end == ends[n + 1]
            assert if_first == (n if m == 0 else -1)
            assert if_last == (n if m == count - 1 else -1)
            if lengths[n]:
                assert first_token == chunks[first_chunk][0]
                assert num_chunks >= 1
            if segment_chunks is not None:
                assert num_chunks <= segment_chunks
                assert num_chunks == segment_chunks or m == count - 1
            next_chunk += num_chunks
    assert next_chunk == len(expected)
    for _, num_chunks, _, _, if_first, if_last in segments[next_segment:]:
        assert (num_chunks, if_first, if_last) == (0, -1, -1)


@given(any_lengths, any_chunk, any_segment)
def test_property_packed_sequences(lengths: list[int], chunk: int, segment_chunks: int | None) -> None:
    require_right(packed(lengths, chunk, segment_chunks), lengths, chunk, segment_chunks)


@pytest.mark.parametrize("segment_chunks", [None, 1, 3])
def test_more_sequences_than_a_program_looks_at_together(segment_chunks: int | None) -> None:
    lengths = [0, *(7 * n % 31 for n in range(2 * layout.ROWS)), 8 * layout.ROWS * 2, 0]
    require_right(packed(lengths, 8, segment_chunks), lengths, 8, segment_chunks)


@pytest.mark.gpu
@pytest.mark.parametrize("segment_chunks", [None, 1, 8])
@pytest.mark.parametrize("num_sequences", [1, 63, 64, 65, 1000])
def test_packed_sequences_on_a_gpu(num_sequences: int, segment_chunks: int | None) -> None:
    lengths = [int(n) for n in torch.randint(0, 700, (num_sequences,))]
    require_right(packed(lengths, 64, segment_chunks), lengths, 64, segment_chunks)


def test_an_end_beyond_the_text_is_the_end_of_the_text() -> None:
    ends = torch.tensor([0, 5, 99], dtype=torch.int64, device=DEVICE)
    made = tables(1, 12, ends, DEVICE, chunk=8)
    require_right(made, [5, 7], 8, None)


@given(st.integers(1, 4), st.integers(0, 70), st.sampled_from([8, 16]), any_segment)
def test_property_equally_long_sequences_are_the_same_packed_or_not(
    batch: int, time: int, chunk: int, segment_chunks: int | None
) -> None:
    uniform = tables(batch, time, None, DEVICE, chunk=chunk, segment_chunks=segment_chunks)
    require_right(uniform, [time] * batch, chunk, segment_chunks)
    as_packed = packed([time] * batch, chunk, segment_chunks)
    assert torch.equal(uniform.chunks, as_packed.chunks[: len(uniform.chunks)])
    assert torch.equal(uniform.segments, as_packed.segments[: len(uniform.segments)])
    assert torch.equal(uniform.sequences, as_packed.sequences)


def test_tables_are_made_once_for_each_state_of_the_lengths() -> None:
    ends = torch.tensor([0, 5, 30], dtype=torch.int32, device=DEVICE)

    def of(chunk: int = 8) -> Tables:
        return tables(1, 30, ends, DEVICE, chunk=chunk, segment_chunks=2)

    first = of()
    assert of() is first
    assert of(16) is not first
    ends[1] = 20
    moved = of()
    assert moved is of()
    assert moved.chunks.tolist()[:5] == [[0, 8], [8, 8], [16, 4], [20, 8], [28, 2]]
    assert first.chunks.tolist()[:5] == [[0, 5], [5, 8], [13, 8], [21, 8], [29, 1]]
    assert tables(2, 30, None, DEVICE, chunk=8) is tables(2, 30, None, DEVICE, chunk=8)


def test_lengths_that_nobody_counts_the_changes_of() -> None:
    with torch.inference_mode():
        ends = torch.tensor([0, 5, 30], dtype=torch.int64, device=DEVICE)
        before = tables(1, 30, ends, DEVICE, chunk=8)
        ends[1] = 20
        after = tables(1, 30, ends, DEVICE, chunk=8)
    assert before.chunks[:2].tolist() == [[0, 5], [5, 8]]
    assert after.chunks[:2].tolist() == [[0, 8], [8, 8]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_tables_are_32_bits_wide(dtype: torch.dtype) -> None:
    made = tables(1, 30, torch.tensor([0, 5, 30], dtype=dtype, device=DEVICE), DEVICE, chunk=8, segment_chunks=1)
    assert {x.dtype for x in (made.chunks, made.segments, made.sequences)} == {torch.int32}


@pytest.mark.parametrize("lengths", [None, (3, 9)])
def test_tables_that_are_captured_belong_to_the_graph(lengths: tuple[int, ...] | None) -> None:
    """They are not computed before the graph is replayed: nobody else may be handed them, nor may a cache drop them."""
    ends = None if lengths is None else torch.tensor([0, *accumulate(lengths)], device=DEVICE)
    make = lambda: tables(1, 12, ends, DEVICE, chunk=7)  # noqa: E731
    with mock.patch.object(kept, "is_capturing", return_value=True):
        captured = make()
        again = make()
    outside = make()
    assert captured.chunks.data_ptr() != again.chunks.data_ptr()
    assert outside.chunks.data_ptr() not in (captured.chunks.data_ptr(), again.chunks.data_ptr())
    assert outside.chunks.data_ptr() == make().chunks.data_ptr()
    assert all(torch.equal(x, y) for x, y in zip(captured, outside, strict=True))


def test_a_graph_keeps_the_tables_made_before_its_capture() -> None:
    """Equal lengths never change, so that nothing of them needs to be captured."""
    make = lambda: tables(3, 12, None, DEVICE, chunk=5)  # noqa: E731
    before = make()
    with mock.patch.object(kept, "is_capturing", return_value=True):
        captured = make()
        kept._of_streams.cache_clear()  # as when many other shapes have come since
        assert make() is captured
    assert captured is before
    assert make() is not captured, "tables are made anew where the cache has dropped them"


def test_each_stream_has_its_own_tables() -> None:
    make = lambda: tables(3, 12, None, DEVICE, chunk=4)  # noqa: E731
    first = make()
    with mock.patch.object(kept, "current_stream", return_value=1):
        second = make()
        assert make() is second
    assert second is not first
    assert make() is first
