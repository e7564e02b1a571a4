"""Reads documents: text files, JSON lines, Parquet and Hub data sets, in an order that is the same on every run."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridize.errors import CheckpointError, RecipeError
from hybridize.recipe.schema import Data
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
_GLOB_CHARACTERS = frozenset("*?[")


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
    return [(_identity(path, base), path) for path in _files(source, base, _DEFAULT_PATTERNS[kind])]


def source_format(source: TextSource, base: Path) -> str:
    """The format of a source: as said, else by the ending of its path, else a Hub data set when no such file is there.

    Raises:
        RecipeError: it cannot be told.
    """
    if source.format is not None:
        return source.format
    ending = Path(source.path).suffix.lower()
    if ending in _FORMAT_BY_ENDING:
        return _FORMAT_BY_ENDING[ending]
    if (base / source.path).is_dir():
        return "text"
    parts = source.path.split("/")
    if len(parts) <= 2 and all(parts) and not ending and not _GLOB_CHARACTERS & set(source.path):
        if (base / source.path).exists():
            return "text"
        return "hub"
    hint = "Add `format: text`, `jsonl`, `parquet` or `hub`."
    raise RecipeError("The format cannot be told from the path's ending.", where=source.path, hint=hint)


def _floats(source: TextSource, base: Path) -> bool:
    is_commit = source.revision is not None and len(source.revision) == 40
    return source_format(source, base) == "hub" and not is_commit


def _hub_commit(source: TextSource) -> str:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
    except Exception as error:
        raise _hub_error(source, error) from None
    if commit is None:
        raise _hub_error(source, ValueError("the Hub names no commit"))
    return commit


def _files(source: TextSource, base: Path, default_pattern: str) -> list[Path]:
    """Matching files, sorted by name so that the order does not depend on the file system."""
    path = base / source.path
    if path.is_dir():
        path = path / default_pattern
    pattern = str(path)
    if not Path(pattern).is_file():  # a plain name may hold glob characters
        matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    else:
        matches = [Path(pattern)]
    files = [match for match in matches if match.is_file()]
    if not files:
        where = "data: " + source.path
        hint = "Paths are relative to the recipe's folder; ** matches folders."
        raise RecipeError(f"No file matches {pattern}.", where=where, hint=hint)
    return files


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        hint = "Check the file and its permissions."
        raise CheckpointError(f"The file cannot be read ({error.strerror}).", where=str(path), hint=hint) from None
    if not content:
        raise CheckpointError("The file is empty.", where=str(path), hint="Remove it or fill it.")
    return content


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "Convert the file, for example with `iconv -t UTF-8`."
        raise CheckpointError(f"The text is not UTF-8 (byte {error.start}).", where=where, hint=hint) from None


def _label(source: TextSource, path: Path) -> str:
    if source.name is not None:
        return source.name
    head, separator, _ = path.stem.partition("--")
    if separator and head:
        return head
    pattern = Path(source.path)
    named = [part for part in (pattern.stem, *(p.name for p in pattern.parents)) if part]
    return next((part for part in named if not _GLOB_CHARACTERS & set(part)), path.stem)


def _identity(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _read_text(source: TextSource, base: Path, offline: bool) -> Iterator[Document]:
    for path in _files(source, base, _DEFAULT_PATTERNS["text"]):
        text = _decode(_read_bytes(path), str(path)).removeprefix("\ufeff")
        parts = text.split("\0")
        for number, part in enumerate(parts):
            identity = _identity(path, base)
            yield Document(part, _label(source, path), identity if len(parts) == 1 else f"{identity}#{number}")


def _read_jsonl(source: TextSource, base: Path, offline: bool) -> Iterator[Document]:
    for path in _files(source, base, _DEFAULT_PATTERNS["jsonl"]):
        with path.open("rb") as lines:
            empty = True
            for number, line in enumerate(lines):
                empty = False
                if not line.strip():
                    continue
                where = f"{path}:{number + 1}"
                try:
                    row = json.loads(_decode(line, where))
                except (ValueError, RecursionError) as error:
                    hint = "Every line must be one JSON object."
                    raise CheckpointError(f"The line is not JSON ({error}).", where=where, hint=hint) from None
                yield Document(_column(row, source, where), _label(source, path), f"{_identity(path, base)}#{number}")
        if empty:
            raise CheckpointError("The file is empty.", where=str(path), hint="Remove it or fill it.")


def _read_parquet(source: TextSource, base: Path, offline: bool) -> Iterator[Document]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    for path in _files(source, base, _DEFAULT_PATTERNS["parquet"]):
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if source.column not in file.schema_arrow.names:
                    raise _no_column(source, file.schema_arrow.names, str(path))
                for batch in file.iter_batches(batch_size=256, columns=[source.column]):
                    for row in batch.to_pylist():
                        text = _column(row, source, f"{path}#{number}")
                        yield Document(text, _label(source, path), f"{_identity(path, base)}#{number}")
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            hint = "Write or download the file again."
            raise CheckpointError(f"The Parquet file cannot be read ({error}).", where=str(path), hint=hint) from None


def _read_hub(source: TextSource, base: Path, offline: bool) -> Iterator[Document]:
    import datasets

    place = f"{source.path}@{source.revision}" if source.revision else source.path
    try:
        rows = datasets.load_dataset(
            source.path,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=not offline,
            download_config=datasets.DownloadConfig(local_files_only=offline),
        )
    except Exception as error:
        raise _hub_error(source, error) from None
    label = source.name or source.path.rsplit("/", 1)[-1]
    for number, row in enumerate(rows):
        identity = f"{place}/{source.split}#{number}"
        yield Document(_column(row, source, identity), label, identity)


def _hub_error(source: TextSource, error: Exception) -> CheckpointError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    what = f"The data set cannot be read from the Hub ({first_line})."
    hint = "Check name, config, split and revision, and the network; local files need a path with an ending."
    return CheckpointError(what, where=source.path, hint=hint)


def _column(row: Any, source: TextSource, where: str) -> str:
    if not isinstance(row, dict) or source.column not in row:
        raise _no_column(source, sorted(row) if isinstance(row, dict) else [], where)
    value = row[source.column]
    if not isinstance(value, str):
        kind = type(value).__name__
        hint = "Give the column that holds the text."
        raise CheckpointError(f"Column {source.column!r} holds a {kind}, not a text.", where=where, hint=hint)
    return value


def _no_column(source: TextSource, names: Sequence[str], where: str) -> CheckpointError:
    hint = f"Set `column` to one of: {', '.join(names[:12])}." if names else "Every row must be an object with columns."
    return CheckpointError(f"There is no column {source.column!r}.", where=where, hint=hint)


_FORMATS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub}
