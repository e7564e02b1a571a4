"""Reads documents: text files, JSON lines, Parquet and Hub data sets, in an order that is the same on every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hybridize.errors import CheckpointError, RecipeError
from hybridize.recipe.rows import Row, hub_error, hub_rows, jsonl_rows, parquet_rows, text_of
from hybridize.recipe.schema import Data
from hybridize.recipe.source_files import (
    GLOB_CHARACTERS,
    PACKAGE,
    decode,
    find_files,
    identity,
    label,
    place,
    read_bytes,
)
from hybridize.recipe.sources import TextSource

_FORMAT_BY_ENDING = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_DEFAULT_PATTERNS = {"text": "**/*.txt", "jsonl": "**/*.jsonl", "parquet": "**/*.parquet"}
"""Which files of a folder are read."""


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        source_name: label in reports: the source's `name`, or for files called `<label>--<title>.<ending>` the label.
        id: where it came from: file (relative to the recipe where it lies below it), and `#n` for the n-th in a file.
    """

    text: str
    source_name: str
    id: str

    @property
    def key(self) -> str:
        """SHA-256 of the text: equal texts are one document, wherever they lie."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_documents(
    source: TextSource, base: Path, *, offline: bool = False, limit_bytes: int | None = None
) -> Iterator[Document]:
    """The documents of one source, in a fixed order; texts of nothing but white space are left out.

    Args:
        base: folder that relative paths start from (that of the recipe).
        offline: never ask the network; Hub data sets must be in the cache.
        limit_bytes: stop after the document with which this many bytes of text are reached.

    Raises:
        RecipeError: nothing matches the path, or the format cannot be told.
        CheckpointError: a file that is empty, is not UTF-8, or lacks the column; no document in the source.
    """
    seen_bytes = 0
    found = False
    for document in _FORMATS[source_format(source, base)](source, base, offline):
        if not document.text.strip():
            continue
        found = True
        yield document
        seen_bytes += len(document.text.encode())
        if limit_bytes is not None and seen_bytes >= limit_bytes:
            return
    if not found:
        hint = "Give files, or a split, that hold text."
        raise CheckpointError("The source holds no document with text.", where=source.path, hint=hint)


def read_rows(source: TextSource, base: Path, *, offline: bool = False) -> Iterator[Row]:
    """The rows of one source with all their columns, in a fixed order.

    Raises:
        RecipeError: nothing matches the path, or its files hold no rows.
        CheckpointError: a file that is empty or cannot be read.
    """
    kind = source_format(source, base)
    if kind == "jsonl":
        return jsonl_rows(source, find_files(source, base, _DEFAULT_PATTERNS[kind]), base)
    if kind == "parquet":
        return parquet_rows(source, find_files(source, base, _DEFAULT_PATTERNS[kind]), base)
    if kind == "hub":
        return hub_rows(source, offline)
    hint = "Give JSON lines, Parquet or a Hub data set."
    raise RecipeError("The source holds texts, not rows with columns.", where=source.path, hint=hint)


def training_documents(source: TextSource, data: Data, base: Path, *, offline: bool = False) -> Iterator[Document]:
    """Documents of a training source without those that are held out (`held_out_keys` tells by text)."""
    held_out = held_out_keys(data, base, offline=offline)
    share = 0.0 if data.held_out else data.held_out_share
    for document in read_documents(source, base, offline=offline):
        if not is_held_out(document, share) and document.key not in held_out:
            yield document


def held_out_documents(
    data: Data, base: Path, *, offline: bool = False, limit_bytes: int | None = None
) -> Iterator[Document]:
    """The held-out documents: those of the `held_out` sources, or the held-out share of the training sources.

    Args:
        limit_bytes: leave a source after the document with which this many bytes of held-out text are reached. A
            data set that is streamed may have no end.
    """
    share = 0.0 if data.held_out else data.held_out_share
    if not data.held_out and share == 0:
        return  # no document would end the search
    for source in data.held_out or data.train:
        seen_bytes = 0
        for document in read_documents(source, base, offline=offline):
            if not data.held_out and not is_held_out(document, share):
                continue
            yield document
            seen_bytes += len(document.text.encode())
            if limit_bytes is not None and seen_bytes >= limit_bytes:
                break


def held_out_keys(data: Data, base: Path, *, offline: bool = False) -> frozenset[str]:
    """Keys of the texts in the held-out files, which training passes over even where a training source has them too.

    Hub data sets are not read for this: they may be large, and their splits are parted by those who made them.

    Raises:
        RecipeError: the same split of a Hub data set is both trained on and held out.
    """
    keys: set[str] = set()
    for source in data.held_out:
        if source_format(source, base) != "hub":
            keys.update(document.key for document in read_documents(source, base, offline=offline))
            continue
        trained_on = {(other.path, other.config, other.split) for other in data.train}
        if (source.path, source.config, source.split) in trained_on:
            where = "data.held_out"
            hint = "Hold out another split, or leave held_out away and give held_out_share."
            raise RecipeError(f"{source.path} {source.split} is also trained on.", where=where, hint=hint)
    return frozenset(keys)


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document belongs to the held-out `share`; decided by its text alone, so that it never changes."""
    return int(document.key[:16], 16) < share * 2**64


def pin_revisions(sources: Sequence[TextSource], base: Path, *, offline: bool = False) -> tuple[TextSource, ...]:
    """The sources with every Hub data set's revision made a commit, so that a run can be repeated.

    Raises:
        CheckpointError: the Hub does not know the data set or cannot be reached.
    """
    return tuple(
        replace(source, revision=_hub_commit(source)) if _floats(source, base) and not offline else source
        for source in sources
    )


def local_files(source: TextSource, base: Path) -> list[tuple[str, Path]]:
    """(id, path) of the files of a source, in order; none for a Hub data set."""
    kind = source_format(source, base)
    if kind == "hub":
        return []
    return [(identity(path, source, base), path) for path in find_files(source, base, _DEFAULT_PATTERNS[kind])]


def source_format(source: TextSource, base: Path) -> str:
    """The format of a source: as said, else by the ending of its path, else a Hub data set when no such file is there.

    Raises:
        RecipeError: it cannot be told, or the source's package is not installed.
    """
    if source.format is not None:
        return source.format
    ending = Path(source.path).suffix.lower()
    if ending in _FORMAT_BY_ENDING:
        return _FORMAT_BY_ENDING[ending]
    found = place(source, base)
    if found.is_dir():
        return "text"
    parts = source.path.split("/")
    if len(parts) <= 2 and all(parts) and not ending and not GLOB_CHARACTERS & set(source.path):
        if found.exists():
            return "text"
        if not source.path.startswith(PACKAGE):
            return "hub"
    hint = "Give files that end in .txt, .jsonl or .parquet; in a recipe, also `format: text` (or jsonl, parquet, hub)."
    raise RecipeError("The format cannot be told from the path's ending.", where=source.path, hint=hint)


def _floats(source: TextSource, base: Path) -> bool:
    is_commit = source.revision is not None and len(source.revision) == 40
    return source_format(source, base) == "hub" and not is_commit


def _hub_commit(source: TextSource) -> str:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
    except Exception as error:
        raise hub_error(source, error) from None
    if commit is None:
        raise hub_error(source, ValueError("the Hub names no commit"))
    return commit


def _read_text(source: TextSource, base: Path, offline: bool) -> Iterator[Document]:
    for path in find_files(source, base, _DEFAULT_PATTERNS["text"]):
        text = decode(read_bytes(path), str(path)).removeprefix("\ufeff")
        parts = text.split("\0")
        for number, part in enumerate(parts):
            name = identity(path, source, base)
            yield Document(part, label(source, path), name if len(parts) == 1 else f"{name}#{number}")


def _read_jsonl(source: TextSource, base: Path, offline: bool) -> Iterator[Document]:
    return _texts(jsonl_rows(source, find_files(source, base, _DEFAULT_PATTERNS["jsonl"]), base), source)


def _read_parquet(source: TextSource, base: Path, offline: bool) -> Iterator[Document]:
    files = find_files(source, base, _DEFAULT_PATTERNS["parquet"])
    return _texts(parquet_rows(source, files, base, columns=[source.column]), source)


def _read_hub(source: TextSource, base: Path, offline: bool) -> Iterator[Document]:
    return _texts(hub_rows(source, offline), source)


def _texts(rows: Iterator[Row], source: TextSource) -> Iterator[Document]:
    for row in rows:
        yield Document(text_of(row, source), row.label, row.id)


_FORMATS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub}
