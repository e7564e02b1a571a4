"""The beginning: what was lost and saved in words, as a table, and as a picture with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridize.report.blocks import Block, Figure, Paragraphs, Section
from hybridize.report.charts.rows import Bar, row_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.numbers import tokens
from hybridize.report.pairs import by_length, chance_of, says_nothing
from hybridize.report.results import Results, probe
from hybridize.report.tables import summary
from hybridize.report.verdict import verdict

_WIDEST = 1.5


def opening(results: Results) -> Section:
    """The verdict, the summary, and what is kept of everything the teacher can answer."""
    blocks: list[Block] = [Paragraphs(verdict(results)), summary(results)]
    bars = [*_kept(results)]
    if bars:
        axis = Axis("student over teacher (95 % interval)", low=0.0, high=_WIDEST, show=lambda value: f"{value:g}")
        blocks.append(Figure("kept", "What is kept", row_chart("What is kept", bars, axis, one=1.0, filled=False)))
    return Section("Summary", blocks)


def _kept(results: Results) -> list[Bar]:
    bars = []

    def add(label: str, pair: Mapping[str, Any], chance: float = 0.0) -> None:
        kept = pair["kept"]
        if kept is not None and not says_nothing(pair, chance):
            bars.append(Bar(label, kept["value"], kept["low"], kept["high"], f"{kept['value']:.2f}"))

    if recall := probe(results, "recall"):
        for length, pair in by_length(recall["by_length"]):
            add(f"recall, {tokens(length)}", pair)
    if reading := probe(results, "reading"):
        add("reading", reading)
        for name, pair in reading["sources"].items() if len(reading["sources"]) > 1 else ():
            add(f"reading, {name}", pair)
    if choices := probe(results, "choices"):
        add("multiple choice", choices, chance_of(choices))
    return bars
