"""In which pieces texts are read: as many rows at once as a chunk holds, long texts chunk by chunk.

A padded piece beside a long state would need a mask of everything, so rows that do not go on alike share a piece only
where that is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PADDED_TOKENS = 512
"""Longest piece in which rows with a past may be padded."""


@dataclass(frozen=True)
class Piece:
    """Rows first .. end - 1 read the tokens start .. start + length - 1 of their texts, as far as they have them."""

    first: int
    end: int
    start: int
    length: int
    padded: bool


def pieces(lengths: Sequence[int], positions: Sequence[int], chunk_tokens: int) -> list[Piece]:
    """Args: the length of each row's text, the position where it begins, and the most tokens of a piece."""
    found: list[Piece] = []
    row = 0
    while row < len(lengths):
        end = row + 1
        while end < len(lengths) and _share_a_piece(lengths, positions, row, end, chunk_tokens):
            end += 1
        longest = max(lengths[row:end])
        padded = len(set(lengths[row:end])) > 1 or len(set(positions[row:end])) > 1
        for start in range(0, longest, chunk_tokens):
            found.append(Piece(row, end, start, min(chunk_tokens, longest - start), padded))
        row = end
    return found


def _share_a_piece(lengths: Sequence[int], positions: Sequence[int], first: int, last: int, chunk_tokens: int) -> bool:
    """Whether the rows first .. last may be read at once."""
    own, there = lengths[first : last + 1], positions[first : last + 1]
    if len(own) * max(own) > chunk_tokens:
        return False
    alike = len(set(own)) == 1 and len(set(there)) == 1
    return alike or max(there) == 0 or max(own) <= PADDED_TOKENS
