"""What a corpus is made of, as the command line says it: `[NAME:]PATH[=WEIGHT]`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridize.corpus.mixture import Weight
from hybridize.errors import UsageError
from hybridize.recipe.source_files import PACKAGE, label
from hybridize.recipe.sources import TextSource

_NAMED = re.compile(rf"(?!{PACKAGE})([A-Za-z0-9_.-]+):(.+)", re.DOTALL)
_WEIGHTED = re.compile(r"(.+)=\s*([0-9.eE+-]+)\s*(%?)", re.DOTALL)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


@dataclass(frozen=True)
class Ingredient:
    """A source of training text and its weight in the mixture."""

    source: TextSource
    weight: Weight = field(default_factory=Weight)

    @property
    def name(self) -> str:
        """What its files are called."""
        return source_name(self.source)


@dataclass(frozen=True)
class CorpusOptions:
    """What a corpus of text shall be.

    Attributes:
        train: sources of training text.
        held_out: sources that are never trained on.
        held_out_share: share of the training sources' documents that is held out, in 0..1.
        tokens: length of the training text; None: as much as there is.
        min_tokens: shorter documents are left out.
        max_repeats: how often a document may be used.
        facts: share of the training tokens that are documents with facts, in 0..1.
        sequence_tokens: length of a document with facts, at most.
        seed: of the order, and of what is drawn.
    """

    train: tuple[Ingredient, ...]
    held_out: tuple[TextSource, ...] = ()
    held_out_share: float = 0.02
    tokens: int | None = None
    min_tokens: int = 64
    max_repeats: int = 1
    facts: float = 0.0
    sequence_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.train:
            raise UsageError("there is no text to make a corpus of.", hint="Give --text PATH, or --from-teacher MODEL.")
        names = [ingredient.name for ingredient in self.train] + [source_name(source) for source in self.held_out]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            hint = "Name them: --text one:PATH --text two:PATH."
            raise UsageError(f"two sources are called {twice[0]!r}.", where="--text", hint=hint)
        if self.facts and FACTS in names:
            what = f"{FACTS!r} is what the documents of --facts are called."
            raise UsageError(what, where="--text", hint="Call the source otherwise: --text NAME:PATH.")

    def to_json(self) -> dict[str, Any]:
        """The options that decide what is in the corpus."""
        return {
            "held_out_share": self.held_out_share,
            "tokens": self.tokens,
            "min_tokens": self.min_tokens,
            "max_repeats": self.max_repeats,
            "facts": self.facts,
            "sequence_tokens": self.sequence_tokens,
        }


FACTS = "facts"


def source_name(source: TextSource) -> str:
    """What a source's files are called: its label, in letters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label(source, Path(source.path))).strip("-.") or "text"


def parse_source(text: str) -> TextSource:
    """`[NAME:]PATH`; NAME has letters, digits, dots, dashes and underscores."""
    named = _NAMED.fullmatch(text)
    return TextSource(named[2], name=named[1]) if named else TextSource(text)


def parse_ingredient(text: str) -> Ingredient:
    """`[NAME:]PATH[=WEIGHT]`: how often to take its documents (`=0.5`), or its share of the mixture (`=10%`).

    Raises:
        UsageError: the weight is not a positive number, or a share of more than everything.
    """
    weighted = _WEIGHTED.fullmatch(text)
    if weighted is None:
        return Ingredient(parse_source(text))
    path, number, percent = weighted.groups()
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0 and not (percent and value > 100)):
        hint = "Write =0.5 for half of its documents, or =10% for a tenth of the mixture."
        raise UsageError(f"{number}{percent} is no weight.", where=f"--text {text}", hint=hint)
    return Ingredient(parse_source(path), Weight(value / 100 if percent else value, bool(percent)))


def parse_tokens(text: str) -> int:
    """ "30M" -> 30000000; "500k" -> 500000.

    Raises:
        UsageError: not a number of tokens.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmbg]?)\s*", text.lower())
    count = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count <= 0:
        hint = "Write a number such as 30M or 500k."
        raise UsageError(f"{text!r} is not a number of tokens.", where="--tokens", hint=hint)
    return count
