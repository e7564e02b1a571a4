"""Charts of latency and memory against context, implementations beside each other."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hybridize.report.blocks import Figure
from hybridize.report.charts.lines import Point, Series, line_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.charts.style import NUM_COLOURS
from hybridize.report.inference_rows import Rows, implementations, milliseconds, sections
from hybridize.report.numbers import rounded, size, tokens

_MOST_MARKS = 9
"""Points of a line that are marked and named one by one; more are a curve."""


def figures(rows: Rows) -> list[Figure]:
    """Time against context for each batch, and state bytes against context, where there are two contexts at least."""
    found: list[Figure] = []
    for section, own in sections(rows):
        first = f"{_slug(section)}-" if section else ""
        before = f"{section}: " if section else ""
        for batch in sorted({row["case"]["B"] for row in own if row["pass"] in ("prefill", "decode")}):
            for name in ("decode", "prefill"):
                of_pass = [row for row in own if row["pass"] == name and row["case"]["B"] == batch]
                found += _time_figure(f"{first}{name}-{batch}", f"{before}{name}, batch {batch}", of_pass, batch)
        chunks = [row for row in own if row["pass"] == "chunk"]
        found += _figure(f"{first}chunks", f"{before}prefill of one long text", chunks, "ms", "milliseconds a chunk")
        decoded = [row for row in own if row["pass"] == "decode"]
        found += _figure(
            f"{first}state-bytes", f"{before}state of one sequence", decoded, "state_bytes", "state bytes", logarithm=2
        )
    return found


def _time_figure(name: str, title: str, rows: Rows, batch: int) -> list[Figure]:
    if rows and rows[0]["pass"] == "prefill":
        return _figure(name, title, rows, "tokens_per_s", "tokens a second", logarithm=10)
    return _figure(name, title, rows, "ms", f"milliseconds a {'token' if batch == 1 else 'step'}", logarithm=10)


def _figure(
    name: str, title: str, rows: Rows, measure: str, label: str, *, logarithm: int | None = None
) -> list[Figure]:
    """A line an implementation; none where there is one context alone."""
    measured = [row for row in rows if "error" not in row]
    contexts = sorted({row["case"]["context"] for row in measured})
    if len(contexts) < 2:
        return []
    series = []
    for impl, kind in _kinds(implementations(measured)).items():
        places = {
            float(row["case"]["context"]): float((milliseconds(row) if measure == "ms" else None) or row[measure])
            for row in measured
            if row["impl"] == impl
        }
        points = [Point(x, places[x]) for x in sorted(places)]
        series.append(Series(impl, kind, points, marked=len(points) <= _MOST_MARKS))
    many = len(contexts) > _MOST_MARKS
    x = Axis(
        "context (tokens)",
        base=None if many else 2,
        ticks=() if many else [float(context) for context in contexts],
        show=lambda value: tokens(round(value)),
        low=0.0 if many else None,
    )
    show = (lambda value: size(value).replace(".0 ", " ")) if measure == "state_bytes" else rounded
    y = Axis(label, base=logarithm, show=show, low=0.0 if logarithm is None else None)
    return [Figure(name, title, line_chart(title, series, x, y))]


def _kinds(names: Sequence[str]) -> dict[str, str]:
    """A colour for each: the first hybrid's and the first teacher's are those of every report."""
    kinds, free = {}, iter([f"c{number}" for number in range(NUM_COLOURS)] * len(names))
    taken: set[str] = set()
    for name in names:
        kind = "teacher" if name.startswith("teacher") else "student"
        kinds[name] = next(free) if kind in taken else kind
        taken.add(kind)
    return kinds


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
