"""Reads the sources, leaves out what is there twice, and parts training text from held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybridize.corpus.duplicates import find_duplicates
from hybridize.corpus.ingredients import CorpusOptions, source_name
from hybridize.corpus.lengths import Measure
from hybridize.errors import UsageError
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.documents import Document, is_held_out, read_documents, source_format
from hybridize.recipe.sources import TextSource

_BYTES_PER_TOKEN = 16
"""What is read at most of a data set that is streamed, which may have no end, for every token that is wanted."""


@dataclass(frozen=True)
class Entry:
    """A document that is kept, and its length in the measure's unit."""

    document: Document
    length: int


@dataclass
class Gathered:
    """What became of the documents of one source. Every document that was read is counted once.

    Attributes:
        source: where they come from; `name`: what its files are called.
        held_out_source: whether all of it is held out.
        read: documents.
        exact_duplicates, near_duplicates: documents like an earlier one, which were left out.
        like_held_out: documents of a training source like one of a held-out source, which were left out.
        short: documents of fewer tokens than wanted, which were left out.
        train, held_out: what is left.
    """

    source: TextSource
    held_out_source: bool
    read: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    like_held_out: int = 0
    short: int = 0
    train: list[Entry] = field(default_factory=list)
    held_out: list[Entry] = field(default_factory=list)

    @property
    def name(self) -> str:
        return source_name(self.source)


def gather(
    options: CorpusOptions, measure: Measure, base: Path, *, offline: bool = False, reporter: Reporter = SILENT
) -> list[Gathered]:
    """All sources, the held-out ones first: of equal documents the first one stays, which then is never trained on.

    No document of the training text is a duplicate or near duplicate of another, or of a held-out one
    (`hybridize.corpus.duplicates`). A document's side is decided by its own text (`is_held_out`).

    Args:
        base: folder that relative paths start from.

    Raises:
        RecipeError, CheckpointError: a source cannot be read.
        UsageError: one is streamed from the Hub, and the options have no number of tokens.
    """
    sources = [Gathered(source, True) for source in options.held_out]
    sources += [Gathered(ingredient.source, False) for ingredient in options.train]
    limit_bytes = None if options.tokens is None else options.tokens * _BYTES_PER_TOKEN
    documents: list[tuple[Gathered, Document]] = []
    with reporter.task("reading", len(sources)) as task:
        for gathered in sources:
            streamed = source_format(gathered.source, base) == "hub"
            if streamed and limit_bytes is None:
                what = "a data set of the Hub is streamed and may have no end."
                raise UsageError(what, where=gathered.source.path, hint="Say how much of it to read: --tokens.")
            limit = limit_bytes if streamed else None
            found = read_documents(gathered.source, base, offline=offline, limit_bytes=limit)
            documents += [(gathered, document) for document in found]
            task.advance()
    kept = _without_duplicates(documents, reporter)
    lengths = measure.lengths([document.text for _, document in kept], reporter)
    shortest = measure.of_tokens(options.min_tokens)
    for (gathered, document), length in zip(kept, lengths, strict=True):
        if length < shortest:
            gathered.short += 1
        elif gathered.held_out_source or is_held_out(document, options.held_out_share):
            gathered.held_out.append(Entry(document, length))
        else:
            gathered.train.append(Entry(document, length))
    return sources


def _without_duplicates(
    documents: Sequence[tuple[Gathered, Document]], reporter: Reporter
) -> list[tuple[Gathered, Document]]:
    kept = []
    kin = find_duplicates([document.text for _, document in documents], reporter)
    for number, (gathered, document) in enumerate(documents):
        gathered.read += 1
        first, exact = kin[number].group, kin[number].exact
        if first == number:
            kept.append((gathered, document))
        elif documents[first][0].held_out_source and not gathered.held_out_source:
            gathered.like_held_out += 1
        elif exact:
            gathered.exact_duplicates += 1
        else:
            gathered.near_duplicates += 1
    return kept
