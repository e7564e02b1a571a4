"""Prompts put together from tokenised pieces, so that they have exactly the length that was asked for.

Texts are tokenised sentence by sentence and joined as tokens. Tokenizers split at blanks and line ends before they
merge, so that the tokens are those of the joined text, but for the one place where a haystack is cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hybridize.evaluation.windows import start_tokens

Ids = tuple[int, ...]

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")


class Pieces:
    """A tokenizer, and the prose, by pieces.

    Attributes:
        start: the tokenizer's start token, or nothing.
        texts: the sentences of each text, white space made single blanks.
    """

    def __init__(self, tokenizer: Any, prose: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.start: Ids = tuple(start_tokens(tokenizer))
        self.texts = [sentences for text in prose if (sentences := split_sentences(text))]
        letter = self._ids("a")
        # SentencePiece writes a blank before every text, also before a piece that continues another.
        self._adds_blank = " " in tokenizer.decode([*letter, *letter])
        self._known: dict[str, Ids] = {}
        self.line_end = self._ids("a\n")[len(letter) :]

    def opening(self, text: str) -> Ids:
        """The tokens of a text that begins the prompt; if it ends with a line end, a word follows."""
        if not text.endswith("\n"):
            return self._ids(text)
        # How several line ends are split depends on what follows them.
        return self._ids(f"{text}a")[: -len(self.joined("a"))]

    def joined(self, text: str) -> Ids:
        """The tokens of a text that follows another with nothing between them, or begins a line."""
        if not self._adds_blank:
            return self._remembered(text)
        return self._remembered(f"\n{text}")[len(self._remembered("\n")) :]

    def spaced(self, text: str) -> Ids:
        """The tokens of a text that follows another after a blank."""
        return self._remembered(text if self._adds_blank else f" {text}")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self.tokenizer.decode(ids))

    def _remembered(self, text: str) -> Ids:
        if text not in self._known:
            self._known[text] = self._ids(text)
        return self._known[text]

    def _ids(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def split_sentences(text: str) -> list[str]:
    """Sentences with single blanks between words; a sentence ends at a full stop, ! or ?, with what closes it."""
    parts: list[str] = []
    at = 0
    flat = " ".join(text.split())
    for match in _SENTENCE_END.finditer(flat):
        parts.append(flat[at : match.end()].strip())
        at = match.end()
    return [part for part in (*parts, flat[at:].strip()) if part]
