"""What decoding costs: state bytes and speed; and what quality they buy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from hybridize.report.blocks import Block, Figure, Section
from hybridize.report.charts.lines import Point, Series, line_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.numbers import rounded, size, tokens
from hybridize.report.pairs import by_length, says_nothing
from hybridize.report.results import Results, probe
from hybridize.report.tables import DECODE_HEADER, Table, decode_rows, over_teacher


def cost(results: Results) -> Section:
    """Memory and speed."""
    blocks: list[Block] = []
    state = probe(results, "state_bytes")
    if state:
        blocks += _state(state)
        recall = probe(results, "recall")
        blocks += _quality(state, recall) if recall else ()
    if speed := probe(results, "speed"):
        blocks += _speed(speed)
        note = (
            "Milliseconds a step of all sequences, and bytes of the state of one. Measured on the machine named below."
        )
        blocks.append(Table("Decode", DECODE_HEADER, decode_rows(results), note))
    return Section("Memory and speed", blocks)


def _state(state: Mapping[str, Any]) -> Iterator[Block]:
    rows = [
        (tokens(row["tokens"]), size(row["student"]), size(row["teacher"]), f"× {row['student'] / row['teacher']:.3f}")
        for row in state["by_context"]
    ]
    layers = Counter(layer["mixer"] for layer in state["layers"])
    plan = ", ".join(f"{count} × {name}" for name, count in layers.items())
    note = f"One sequence, keys and values in {state['element_bytes']} bytes. Layers: {plan}."
    yield Table("State bytes", ("context", "student", "teacher", "student : teacher"), rows, note)
    series = [
        Series(
            f"{name}, {size(state['by_context'][-1][name])} at {tokens(state['by_context'][-1]['tokens'])}",
            name,
            [Point(float(row["tokens"]), float(row[name])) for row in state["by_context"]],
        )
        for name in ("teacher", "student")
    ]
    ticks = [float(row["tokens"]) for row in state["by_context"]]
    x = Axis("context (tokens)", base=2, ticks=ticks, show=lambda value: tokens(round(value)))
    title = "State bytes of one sequence"
    yield Figure(
        "state-bytes",
        title,
        line_chart(title, series, x, Axis("state bytes", base=2, show=lambda value: size(value).replace(".0 ", " "))),
    )


def _quality(state: Mapping[str, Any], recall: Mapping[str, Any]) -> Iterator[Block]:
    """Recall kept against state bytes, a point for each length that both were measured at."""
    ratios = {row["tokens"]: row["student"] / row["teacher"] for row in state["by_context"]}
    points = [
        Point(ratios[length], pair["kept"]["value"], pair["kept"]["low"], pair["kept"]["high"], tokens(length))
        for length, pair in by_length(recall["by_length"])
        if length in ratios and pair["kept"] is not None and not says_nothing(pair)
    ]
    if points:
        x = Axis("state bytes, student over teacher", low=0.0, high=1.0, show=lambda value: f"{value:g}")
        y = Axis("recall, student over teacher", low=0.0, show=lambda value: f"{value:g}")
        title = "Recall kept against state bytes"
        chart = line_chart(title, [Series("by tokens of the prompt", "student", points)], x, y, one=1.0)
        yield Figure("recall-state-bytes", title, chart)


def _speed(speed: Mapping[str, Any]) -> Iterator[Block]:
    rows = [
        (
            f"{row['sequences']} × {tokens(row['tokens'])} tokens",
            rounded(row["student"]),
            rounded(row["teacher"]),
            over_teacher(row),
        )
        for row in speed["prefill"]
    ]
    if rows:
        note = "In tokens a second; more is better. Measured on the machine named below, median of several passes."
        yield Table("Prefill", ("sequences × context", "student", "teacher", "student : teacher"), rows, note)
