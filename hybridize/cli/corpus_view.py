"""A corpus for people to read: what each source gave, and what was left out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybridize.cli.format import count_text, table_lines

if TYPE_CHECKING:
    from rich.console import RenderableType


def corpus_parts(values: Mapping[str, Any]) -> list[RenderableType]:
    """The table of the sources, of what corpus.json says."""
    unit = values["unit"]
    head = ["source", "read", "exact", "near", "like held out", "short", "train", unit, "held out", unit]
    rows = [_row(source, unit) for source in values["sources"]]
    sums = [sum(part[column] for part in rows) for column in range(len(head) - 1)]
    named = [[source["name"], *map(count_text, row)] for source, row in zip(values["sources"], rows, strict=True)]
    return list(table_lines([head, *named, ["all", *map(count_text, sums)]], left=1))


def _row(source: Mapping[str, Any], unit: str) -> list[int]:
    left_out = [source.get(name, 0) for name in ("exact_duplicates", "near_duplicates", "like_held_out", "short")]
    train, held_out = source.get("train", {}), source.get("held_out", {})
    return [
        source.get("documents", 0),
        *left_out,
        train.get("documents", 0),
        train.get(unit, 0),
        held_out.get("documents", 0),
        held_out.get(unit, 0),
    ]
