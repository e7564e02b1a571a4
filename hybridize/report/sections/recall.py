"""Recall by task, length and depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridize.report.blocks import Block, Figure, HeatMap, Section
from hybridize.report.charts.lines import Point, Series, line_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.heat import share_heat
from hybridize.report.numbers import ABSENT, share, tokens
from hybridize.report.pairs import Pair, by_length, kept, pooled, samples_of, says_nothing
from hybridize.report.results import Results, probe
from hybridize.report.tables import Table

_MODELS = ("teacher", "student")


def recall(results: Results) -> Section | None:
    """Tables by task and length and by depth, maps of both, and recall over length."""
    row = probe(results, "recall")
    if row is None:
        return None
    blocks: list[Block | None] = [_by_task(row), _curve(row), _by_depth(row), _kept_map(row), *_depth_maps(row)]
    return Section("Recall", [block for block in blocks if block is not None])


def _by_task(row: Mapping[str, Any]) -> Table:
    named = [("all", row)]
    named += [
        (f"{task}, {tokens(length)}", pair)
        for task, lengths in row["tasks"].items()
        for length, pair in by_length(lengths)
    ]
    rows = [
        (name, share(pair["student"]), share(pair["teacher"]), kept(pair), samples_of(pair)) for name, pair in named
    ]
    note = "Tasks of RULER (arXiv 2404.06654) and multi-query associative recall (arXiv 2312.04927)."
    if row["left_out"]:
        note += f" Left out for want of prose: {', '.join(row['left_out'])}."
    header = ("task, tokens", "student", "teacher", "student : teacher", "questions")
    return Table("Recall by task and length", header, rows, note)


def _curve(row: Mapping[str, Any]) -> Figure | None:
    lengths = by_length(row["by_length"])
    series = [
        Series(
            name,
            name,
            [
                Point(float(length), cell["share"], cell["low"], cell["high"])
                for length, pair in lengths
                if (cell := pair[name]) is not None
            ],
        )
        for name in _MODELS
        if row[name] is not None
    ]
    if len(lengths) < 2:
        return None
    x = Axis("prompt (tokens)", base=2, ticks=[float(n) for n, _ in lengths], show=lambda value: tokens(round(value)))
    y = Axis("recall", low=0.0, high=1.0, show=lambda value: f"{value * 100:.0f} %")
    title = "Recall over the length of the prompt"
    return Figure("recall", title, line_chart(title, series, x, y))


def _by_depth(row: Mapping[str, Any]) -> Table | None:
    depths = _depths(row["tasks"])
    if not depths:
        return None
    rows = [
        (f"{task}, {tokens(length)}", *(_both(_at(pair, depth)) for depth in depths))
        for task, lengths in row["tasks"].items()
        for length, pair in by_length(lengths)
        if pair["depths"]
    ]
    note = "Student / teacher in per cent, by where the answer stands: 0 % is the beginning of the prompt."
    return Table("Recall by depth", ("task, tokens", *(f"{depth * 100:.0f} %" for depth in depths)), rows, note)


def _both(pair: Pair | None) -> str:
    if pair is None:
        return ABSENT
    cells = (pair["student"], pair["teacher"])
    return " / ".join(f"{cell['share'] * 100:.0f}" for cell in cells if cell is not None)


def _kept_map(row: Mapping[str, Any]) -> HeatMap | None:
    if row["teacher"] is None:
        return None
    lengths = sorted({int(length) for task in row["tasks"].values() for length in task})
    rows = []
    for task, cells in row["tasks"].items():
        pairs = [cells.get(str(length)) for length in lengths]
        shown = [None if pair is None or says_nothing(pair) else pair["kept"]["value"] for pair in pairs]
        rows.append((task, [None if value is None else share_heat(value, f"× {value:.4f}") for value in shown]))
    note = "Student over teacher in per cent; empty where the teacher itself finds next to nothing."
    return HeatMap("Recall kept, task by length", "task", [tokens(length) for length in lengths], rows, note)


def _depth_maps(row: Mapping[str, Any]) -> Iterator[HeatMap]:
    tasks = {task: lengths for task, lengths in row["tasks"].items() if _depths({task: lengths})}
    groups = {"all tasks": tasks, **({task: {task: tasks[task]} for task in tasks} if len(tasks) > 1 else {})}
    for title, chosen in groups.items():
        for name in _MODELS:
            if chosen and row[name] is not None:
                yield _depth_map(f"{title}: {name}", chosen, name)


def _depth_map(title: str, tasks: Mapping[str, Any], name: str) -> HeatMap:
    lengths = sorted({int(length) for cells in tasks.values() for length in cells})
    rows = []
    for depth in _depths(tasks):
        shares = []
        for length in lengths:
            pairs = [_at(cells.get(str(length)), depth) for cells in tasks.values()]
            shares.append(pooled(pair[name] for pair in pairs if pair is not None))
        rows.append((f"{depth * 100:.0f} %", [None if found is None else share_heat(found) for found in shares]))
    return HeatMap(title, "depth", [tokens(length) for length in lengths], rows)


def _at(pair: Pair | None, depth: float) -> Pair | None:
    return next((row for row in (pair or {"depths": []})["depths"] if row["depth"] == depth), None)


def _depths(tasks: Mapping[str, Any]) -> list[float]:
    return sorted({row["depth"] for lengths in tasks.values() for pair in lengths.values() for row in pair["depths"]})
