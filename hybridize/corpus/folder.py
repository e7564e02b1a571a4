"""The folder of a corpus: train/ and held-out/ with JSON lines, corpus.json and README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.checkpoint import AtomicFolder, sha256_file
from hybridize.corpus.card import card

VERSION = 1
FILE = "corpus.json"
TRAIN, HELD_OUT = "train", "held-out"


@dataclass(frozen=True)
class Record:
    """One line of a file.

    Attributes:
        id: where the text came from.
        source: name of its source.
        length: in the corpus's unit; not written.
    """

    text: str
    id: str
    source: str
    length: int


@dataclass(frozen=True)
class CorpusFile:
    """One file: `part` is "train" or "held-out", `name` that of the source."""

    part: str
    name: str
    records: Sequence[Record]

    @property
    def path(self) -> str:
        """Below the corpus's folder."""
        return f"{self.part}/{self.name}.jsonl"


def corpus_folder(out: str | Path, *, overwrite: bool = False) -> AtomicFolder:
    """The folder, which appears whole or not at all; open it before the work, so that it is refused before the work.

    Raises:
        UsageError: it is not empty. ResourceError: disk, quota or permission.
    """
    return AtomicFolder(out, kind="corpus", overwrite=overwrite)


def write_corpus(
    folder: Path, files: Iterable[CorpusFile], about: Mapping[str, Any], *, unit: str = "tokens"
) -> dict[str, Any]:
    """Writes all that is in the folder; the same files give the same bytes. Files without records are left out.

    Args:
        about: what else corpus.json says.
        unit: of the records' lengths.

    Returns:
        What corpus.json says.
    """
    written = {}
    for file in files:
        if not file.records:
            continue
        path = folder / file.path
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as lines:
            lines.writelines(_line(record) for record in file.records)
        sha256, size = sha256_file(folder, file.path)
        length = sum(record.length for record in file.records)
        written[file.path] = {"documents": len(file.records), unit: length, "size_bytes": size, "sha256": sha256}
    summary = {"format": "hybridize-corpus", "version": VERSION, "unit": unit, **about, "files": written}
    (folder / FILE).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(summary), encoding="utf-8")
    return summary


def _line(record: Record) -> str:
    values = {"text": record.text, "id": record.id, "source": record.source}
    return json.dumps(values, ensure_ascii=False) + "\n"
