"""Rows with named columns, read from JSON lines, Parquet and Hub data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.errors import CheckpointError
from hybridize.recipe.source_files import decode, identity, label
from hybridize.recipe.sources import TextSource


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        values: by column; what a line of a JSON file holds may be anything else.
        label: of the source, in reports.
        id: file and number of the row, the same on every machine.
        where: the place that messages name (file:line).
    """

    values: Any
    label: str
    id: str
    where: str


def jsonl_rows(source: TextSource, files: Iterable[Path], base: Path) -> Iterator[Row]:
    """One row a line; blank lines are passed over."""
    for path in files:
        with path.open("rb") as lines:
            empty = True
            for number, line in enumerate(lines):
                empty = False
                if not line.strip():
                    continue
                where = f"{path}:{number + 1}"
                try:
                    values = json.loads(decode(line, where))
                except (ValueError, RecursionError) as error:
                    hint = "Every line must be one JSON object."
                    raise CheckpointError(f"The line is not JSON ({error}).", where=where, hint=hint) from None
                yield Row(values, label(source, path), f"{identity(path, source, base)}#{number}", where)
        if empty:
            raise CheckpointError("The file is empty.", where=str(path), hint="Remove it or fill it.")


def parquet_rows(
    source: TextSource, files: Iterable[Path], base: Path, *, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """Rows with `columns` only; None: with all."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    for path in files:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if columns is not None and not set(columns) <= set(names):
                    raise _no_column(source, names, str(path))
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    for values in batch.to_pylist():
                        name = f"{identity(path, source, base)}#{number}"
                        yield Row(values, label(source, path), name, f"{path}#{number}")
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            hint = "Write or download the file again."
            raise CheckpointError(f"The Parquet file cannot be read ({error}).", where=str(path), hint=hint) from None


def hub_rows(source: TextSource, offline: bool) -> Iterator[Row]:
    """Rows of a split as the Hub gives them; offline, of its copy on this machine."""
    import datasets

    where = f"{source.path}@{source.revision}" if source.revision else source.path
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
        raise hub_error(source, error) from None
    name = source.name or source.path.rsplit("/", 1)[-1]
    for number, values in enumerate(rows):
        place = f"{where}/{source.split}#{number}"
        yield Row(values, name, place, place)


def hub_error(source: TextSource, error: Exception) -> CheckpointError:
    """What to tell when the Hub's client fails."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    what = f"The data set cannot be read from the Hub ({first_line})."
    hint = "Check name, config, split and revision, and the network; local files need a path with an ending."
    return CheckpointError(what, where=source.path, hint=hint)


def text_of(row: Row, source: TextSource) -> str:
    """The column that holds the text.

    Raises:
        CheckpointError: there is no such column, or it holds something else.
    """
    values = row.values
    if not isinstance(values, dict) or source.column not in values:
        raise _no_column(source, sorted(values) if isinstance(values, dict) else [], row.where)
    value = values[source.column]
    if not isinstance(value, str):
        kind = type(value).__name__
        hint = "Give the column that holds the text."
        raise CheckpointError(f"Column {source.column!r} holds a {kind}, not a text.", where=row.where, hint=hint)
    return value


def _no_column(source: TextSource, names: Sequence[str], where: str) -> CheckpointError:
    hint = f"Set `column` to one of: {', '.join(names[:12])}." if names else "Every row must be an object with columns."
    return CheckpointError(f"There is no column {source.column!r}.", where=where, hint=hint)
