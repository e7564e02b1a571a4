"""Pieces cover every text once, in order, and stay within a chunk."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybridize.inference.pieces import PADDED_TOKENS, pieces

ROWS = st.lists(st.tuples(st.integers(0, 700), st.integers(0, 3)), min_size=1, max_size=6)


@given(ROWS, st.integers(1, 900))
def test_every_token_is_read_once_and_in_order(rows, chunk_tokens):
    lengths, positions = [length for length, _ in rows], [500 * place for _, place in rows]
    read = [0] * len(rows)
    for piece in pieces(lengths, positions, chunk_tokens):
        assert (piece.end - piece.first) * piece.length <= chunk_tokens
        for row in range(piece.first, piece.end):
            new = max(0, min(piece.length, lengths[row] - piece.start))
            assert piece.start == read[row] or new == 0
            assert piece.padded or new == piece.length
            read[row] += new
        if piece.padded and any(positions[piece.first : piece.end]):
            assert piece.length <= PADDED_TOKENS
    assert read == lengths


def test_equal_rows_are_read_together_and_long_ones_alone():
    assert [(p.first, p.end) for p in pieces([100] * 4, [0] * 4, 200)] == [(0, 2), (2, 4)]
    assert [(p.first, p.start, p.length) for p in pieces([500, 500], [7, 7], 300)] == [
        (0, 0, 300), (0, 300, 200), (1, 0, 300), (1, 300, 200),
    ]  # fmt: skip
    assert not any(p.padded for p in pieces([9, 9], [4, 4], 100))
    assert [p.padded for p in pieces([9, 4], [4, 4], 100)] == [True]
