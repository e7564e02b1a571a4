"""How long documents are: in tokens where a tokenizer is given, else in characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.progress import SILENT, Reporter

CHARACTERS_PER_TOKEN = 4
"""What a token is taken for where no tokenizer says it."""
_MOST_CHARACTERS = 2**19
"""What is tokenised at a time, unless one document is longer."""
_QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


@dataclass(frozen=True)
class Measure:
    """Measures documents.

    Attributes:
        tokenizer: a transformers tokenizer; None: lengths are characters.
    """

    tokenizer: Any = None

    @property
    def unit(self) -> str:
        """ "tokens" or "characters"."""
        return "characters" if self.tokenizer is None else "tokens"

    def of_tokens(self, tokens: float) -> float:
        """A number of tokens in the unit."""
        return tokens * CHARACTERS_PER_TOKEN if self.tokenizer is None else tokens

    def lengths(self, texts: Sequence[str], reporter: Reporter = SILENT) -> list[int]:
        """The length of each text, without opening and closing tokens."""
        if self.tokenizer is None:
            return [len(text) for text in texts]
        found: list[int] = []
        with reporter.task("counting tokens", sum(map(len, texts))) as task:
            for some in _portions(texts):
                rows = self.tokenizer(some, add_special_tokens=False, verbose=False, return_attention_mask=False)
                found += [len(tokens) for tokens in rows["input_ids"]]
                task.advance(sum(map(len, some)))
        return found


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    characters = 0
    for text in texts:
        portion.append(text)
        characters += len(text)
        if characters >= _MOST_CHARACTERS:
            yield portion
            portion, characters = [], 0
    if portion:
        yield portion


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Lengths at fixed places of their order (nearest rank)."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in _QUANTILES.items()}
