"""Held-out documents, cut into windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.errors import CheckpointError
from hybridize.recipe.documents import Document

_CHARACTERS_PER_TOKEN = 12
"""More than any text needs: documents are cut here before they are turned into tokens, which is the slow part."""


@dataclass(frozen=True)
class Window:
    """A piece of one document.

    Attributes:
        tokens: with the tokenizer's own start token, if it has one.
        source, document: where the text comes from.
        num_prefix: start tokens, which are not scored.
    """

    tokens: tuple[int, ...]
    source: str
    document: str
    num_prefix: int = 0


def by_source(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Documents grouped by source, sources in order of their names."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.source_name, []).append(document)
    return dict(sorted(groups.items()))


def document_records(documents: Iterable[Document]) -> list[dict[str, Any]]:
    """What results.json says of the texts: source, id, characters and SHA-256 of each."""
    return [
        {
            "source": document.source_name,
            "id": document.id,
            "characters": len(document.text),
            "sha256": document.key,
        }
        for document in documents
    ]


def start_tokens(tokenizer: Any) -> list[int]:
    """The start token that the tokenizer puts before every text, or none."""
    ids = list(tokenizer("", add_special_tokens=True)["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def make_windows(
    documents: Sequence[Document], tokenizer: Any, *, context_tokens: int, max_windows: int
) -> list[Window]:
    """Cuts documents into windows, at most `max_windows` of each source.

    The documents of a source take turns, so that a long one does not crowd out the others: first the first window of
    each, then the second. Whole windows come first; shorter texts fill what is left, the longest of them first.

    Raises:
        CheckpointError: not one document has two tokens.
    """
    prefix = start_tokens(tokenizer)
    windows = [
        window
        for source, group in by_source(documents).items()
        for window in _of_source(source, group, tokenizer, prefix, context_tokens, max_windows)
    ]
    if not windows:
        raise CheckpointError(
            "There is no held-out text to measure on.",
            where="data.held_out",
            hint="Give documents of at least a few words.",
        )
    return windows


def _of_source(
    source: str, documents: Sequence[Document], tokenizer: Any, prefix: list[int], context: int, limit: int
) -> list[Window]:
    size = context - len(prefix)
    whole: list[tuple[int, int, Window]] = []  # (turn, document number, window)
    short: list[Window] = []
    for number, document in enumerate(documents):
        text = document.text[: _CHARACTERS_PER_TOKEN * context * limit]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for turn in range(min(len(ids) // size, limit)):
            piece = ids[turn * size : (turn + 1) * size]
            whole.append((turn, number, Window((*prefix, *piece), source, document.id, len(prefix))))
        if 2 <= len(ids) < size:
            short.append(Window((*prefix, *ids), source, document.id, len(prefix)))
        if sum(turn == 0 for turn, _, _ in whole) >= limit:
            break
    chosen = [window for _, _, window in sorted(whole, key=lambda item: item[:2])]
    chosen += sorted(short, key=lambda window: -len(window.tokens))
    return chosen[:limit]
