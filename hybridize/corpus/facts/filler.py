"""Running text that stands between facts: pieces of documents, unit by unit."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hybridize.errors import UsageError

LONGEST_UNIT = 600
"""Characters; a longer sentence or line ends a piece."""
SHORTEST_PIECE, LONGEST_PIECE = 120, 480
"""Tokens that are taken of one document before the next one's turn."""
_CHARACTERS_PER_TOKEN = 5
_PARAGRAPH_END = re.compile(r"\n(?:[ \t\r\f\v]*\n)+")
_SENTENCE_END = re.compile(r"(?<=[.!?])(\s+)(?=[\"'(\[]?[A-Z])")
_TRIES = 200


class Unit(NamedTuple):
    """A sentence or a line behind the white space that parts it from what stands before, and its tokens."""

    text: str
    tokens: int


def units(text: str) -> list[str]:
    """Sentences of a text, or its lines where they are long, each behind a blank, a line end or two."""
    found = []
    for paragraph in _PARAGRAPH_END.split(text):
        if not paragraph.strip():
            continue
        lead = "\n\n"
        for i, part in enumerate(_SENTENCE_END.split(paragraph.rstrip())):
            if i % 2:
                lead = "\n" if "\n" in part else " "
                continue
            lines = part.split("\n") if len(part) > LONGEST_UNIT else [part]
            found += [(lead if n == 0 else "\n") + line.rstrip() for n, line in enumerate(lines) if line.strip()]
    return found


class Filler:
    """Pieces of documents, without end.

    Args:
        documents: every one has its turn, in a drawn order, before one comes again.

    Raises:
        UsageError: there is no text in them.
    """

    def __init__(self, documents: Sequence[str], tokenizer: Any, rng: random.Random) -> None:
        self._documents = [text for text in documents if text.strip()]
        if not self._documents:
            raise UsageError("There is no text to put facts into.", hint="Give documents with sentences or lines.")
        self._tokenizer = tokenizer
        self._rng = rng
        self._order = self._drawn_order()

    def piece(self, most_tokens: int, lengths: tuple[int, int] = (SHORTEST_PIECE, LONGEST_PIECE)) -> list[Unit]:
        """Successive units of one document with at most `most_tokens` tokens in all.

        lengths: of pieces, in tokens, between which the most that one may have is drawn.

        Empty where every unit that was tried is longer.
        """
        wanted = min(most_tokens, self._rng.randint(*lengths))
        for _ in range(_TRIES):
            chosen = self._first_that_fit(self._window(next(self._order), wanted), wanted)
            if chosen:
                return chosen
        return []

    def _drawn_order(self) -> Iterator[str]:
        while True:
            yield from self._rng.sample(self._documents, len(self._documents))

    def _window(self, document: str, tokens: int) -> list[str]:
        """Units from anywhere in a document; the first and the last ones that a cut may have hurt are left out."""
        characters = max(tokens * _CHARACTERS_PER_TOKEN, 2 * LONGEST_UNIT)
        if len(document) <= characters:
            return units(document)
        start = self._rng.randrange(len(document) - characters + 1)
        found = units(document[start : start + characters])
        return found[1 if start else 0 : -1]

    def _first_that_fit(self, texts: Sequence[str], most_tokens: int) -> list[Unit]:
        """The first run of units that fits; one that is too long by itself ends it."""
        chosen: list[Unit] = []
        left = most_tokens
        for text, tokens in zip(texts, count_tokens(self._tokenizer, texts), strict=True):
            unit = Unit(text, tokens)
            if not chosen and tokens <= left:
                unit = self._first(text)
            if unit.tokens <= left and len(text) <= LONGEST_UNIT:
                chosen.append(unit)
                left -= unit.tokens
            elif chosen:
                break
        return chosen

    def _first(self, text: str) -> Unit:
        """A unit that begins a paragraph."""
        text = "\n\n" + (text.lstrip("\n") if text.startswith("\n") else text[1:])
        return Unit(text, count_tokens(self._tokenizer, [text])[0])


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text by itself, no special ones."""
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
    return [len(ids) for ids in found["input_ids"]]
