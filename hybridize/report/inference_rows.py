"""Rows of `hybridize bench` and what is read from them: {"impl", "case": {"B", "context"}, "pass", "ms", ...}."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Rows = Sequence[Row]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.jsonl, without the machine's."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "impl" in row]


def milliseconds(row: Row) -> float | None:
    """The mean of both rounds; None for an error."""
    times = [row[name] for name in ("ms", "again_ms") if row.get(name) is not None]
    return sum(times) / len(times) if times else None


def implementations(rows: Rows) -> list[str]:
    """Their names, in the order of the rows."""
    return list(dict.fromkeys(row["impl"] for row in rows))


def sections(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """(name, rows) of each section in the order of the rows; "" where rows have none."""
    for section in dict.fromkeys(str(row.get("section", "")) for row in rows):
        yield section, [row for row in rows if str(row.get("section", "")) == section]
