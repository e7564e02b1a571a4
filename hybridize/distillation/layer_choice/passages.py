"""Sequences out of whole documents, so that what lies far back in one is of the same text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from hybridize.distillation.data import DocumentStream
from hybridize.distillation.token_stream import Encode
from hybridize.errors import UsageError
from hybridize.recipe.documents import Document

MOST_CHARACTERS = 2**26
"""Read of a source in search of long documents; a data set that is streamed may have no end."""


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of one document.

    Attributes:
        first_token: its place in the document.
    """

    document: Document
    first_token: int
    tokens: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Which text it is: the document's id, the SHA-256 of its text, and the place in it."""
        return {"document": self.document.id, "sha256": self.document.key, "first_token": self.first_token}


class LongDocuments:
    """The documents of one source with enough tokens, in the stream's order, each once."""

    def __init__(self, stream: DocumentStream, encode: Encode, sequence_tokens: int) -> None:
        self._stream, self._encode, self._least = stream, encode, sequence_tokens
        self._characters = 0
        self.lengths: list[int] = []
        """Tokens of each document read, enough or not."""

    def next(self) -> tuple[Document, list[int]] | None:
        """A document and its tokens; None when there is no other.

        Raises:
            RecipeError: the source has no training document.
        """
        while self._characters < MOST_CHARACTERS:
            document = self._stream.next()
            if self._stream.epoch > 0:  # it began again
                break
            self._characters += len(document.text)
            (tokens,) = self._encode([document.text])
            self.lengths.append(len(tokens))
            if len(tokens) >= self._least:
                return document, tokens
        self._characters = MOST_CHARACTERS
        return None


def passages(
    streams: Sequence[DocumentStream],
    weights: Sequence[float],
    encode: Encode,
    *,
    num_sequences: int,
    sequence_tokens: int,
) -> list[Passage]:
    """The beginnings of so many documents; where there are fewer, what follows in them too.

    Args:
        streams: one a source. weights: their shares.
        encode: texts -> token ids of each.

    Raises:
        UsageError: there is not enough text in long documents.
        RecipeError: a source has no training document.
    """
    sources = [LongDocuments(stream, encode, sequence_tokens) for stream in streams]
    given = [0.0] * len(sources)
    left = set(range(len(sources)))
    documents: list[tuple[Document, list[int]]] = []
    while left and len(documents) < num_sequences:
        source = min(left, key=lambda index: (given[index], index))
        found = sources[source].next()
        if found is None:
            left.remove(source)
            continue
        documents.append(found)
        given[source] += 1 / weights[source]
    taken = _in_turn(documents, sequence_tokens)[:num_sequences]
    if len(taken) < num_sequences:
        lengths = [length for source in sources for length in source.lengths]
        raise _too_short(lengths, len(taken), num_sequences, sequence_tokens)
    return taken


def _in_turn(documents: Sequence[tuple[Document, list[int]]], sequence_tokens: int) -> list[Passage]:
    """The first passages of all documents, then the second ones, and so on."""
    found: list[Passage] = []
    for first in count(step=sequence_tokens):
        row = [
            Passage(document, first, tuple(tokens[first : first + sequence_tokens]))
            for document, tokens in documents
            if len(tokens) >= first + sequence_tokens
        ]
        if not row:
            return found
        found += row
    return found


def _too_short(lengths: Sequence[int], found: int, num_sequences: int, sequence_tokens: int) -> UsageError:
    # The sums fall as the sequences grow, so that one can search by halves.
    enough = bisect_left(range(1, sequence_tokens), True, key=lambda n: _num_sequences(lengths, n) < num_sequences)
    hint = f"{enough} tokens are the most of which there are as many. Or give longer documents with --text."
    return UsageError(
        f"the text gives {found} sequences of {sequence_tokens} tokens of one document each, not {num_sequences}.",
        where="--sequence-tokens",
        hint=hint if enough > 1 else "Ask for fewer, or give more text with --text.",
    )


def _num_sequences(lengths: Sequence[int], sequence_tokens: int) -> int:
    return sum(length // sequence_tokens for length in lengths)
