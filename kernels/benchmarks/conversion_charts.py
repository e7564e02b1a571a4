"""The pictures of conversions.jsonl: recall against training tokens, and against the bytes of a decoding state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridize.report.charts.lines import Point, Series, line_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.charts.style import NUM_COLOURS, standalone

Row = Mapping[str, Any]
MEASURE = "niah2_4k"
RECALL = Axis("needles in essays, 4k tokens", low=0.0, high=1.0, show=lambda value: f"{value * 100:.0f} %")
KINDS = (*(f"c{number}" for number in range(NUM_COLOURS)), "student")
MIB = 2**20


def kinds_of(rows: Iterable[Row]) -> dict[str, str]:
    """A colour for each recipe, the same in every picture."""
    names = sorted({row["recipe"] for row in rows})
    return {name: KINDS[number % len(KINDS)] for number, name in enumerate(names)}


def point(row: Row, x: float) -> Point:
    """The recall of a run, with its interval."""
    low, high = row["intervals"][MEASURE]
    return Point(x, row[MEASURE], low, high)


def of_the_recipe(row: Row) -> bool:
    """Whether a run is the recipe itself, or its recipe in another length: lte, lte.10M, not lte.again or lte.wide."""
    return re.fullmatch(re.escape(row["recipe"]) + r"(\.\d+M)?", row["run"]) is not None


def most_trained(rows: Sequence[Row]) -> list[Row]:
    """One run of each recipe: that of the most tokens, the first of them."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["recipe"] not in found or row["tokens"] > found[row["recipe"]]["tokens"]:
            found[row["recipe"]] = row
    return [found[name] for name in sorted(found)]


def against_tokens(rows: Sequence[Row]) -> str:
    """A line a recipe that was trained for several lengths, as <svg>."""
    kinds = kinds_of(rows)
    series = []
    for name, kind in kinds.items():
        own = sorted((row for row in rows if row["recipe"] == name), key=lambda row: row["tokens"])
        if len({row["tokens"] for row in own}) > 1:
            series.append(Series(name, kind, [point(row, row["tokens"] / 1e6) for row in own]))
    ticks = sorted({float(f"{place.x:.1g}") for item in series for place in item.points})
    x = Axis("training tokens (millions)", base=2, ticks=ticks, show=lambda value: f"{value:g}")
    return line_chart("Recall against training", series, x, RECALL, one=rows[0]["teacher"][MEASURE])


def against_state_bytes(rows: Sequence[Row]) -> str:
    """A point a recipe and one of the teacher, as <svg>."""
    kinds = kinds_of(rows)
    series = [
        Series(row["recipe"], kinds[row["recipe"]], [point(row, row["state_bytes_8k"] / MIB)], joined=False)
        for row in most_trained(rows)
    ]
    teacher = rows[0]["teacher"]
    place = Point(teacher["state_bytes_8k"] / MIB, teacher[MEASURE])
    series.append(Series("teacher", "teacher", [place], joined=False))
    x = Axis("state of one sequence of 8k tokens (MiB)", base=2, show=lambda value: f"{value:g}")
    return line_chart("Recall against memory", series, x, RECALL)


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes both pictures into a folder; of runs with other settings than their recipe's there is nothing in them."""
    rows = [row for row in rows if of_the_recipe(row)]
    written = []
    for name, picture in (("tokens", against_tokens), ("state-bytes", against_state_bytes)):
        path = out / f"conversions-recall-{name}.svg"
        path.write_text(standalone(picture(rows)), encoding="utf-8")
        written.append(path)
    return written
