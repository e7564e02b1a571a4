"""Learned eviction beside training-free choices of what stays, at the same budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hybridize.report.blocks import Block, Figure, Section
from hybridize.report.charts.lines import Point, Series, line_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.charts.style import NUM_COLOURS
from hybridize.report.numbers import ABSENT, ranges, rounded, share, tokens, with_error
from hybridize.report.pairs import by_length, pooled
from hybridize.report.results import Results, probe
from hybridize.report.tables import Table
from hybridize.report.verdict import Z_95

Row = Mapping[str, Any]


def baselines(results: Results) -> Section | None:
    """A table of policy by budget, and perplexity and recall over the budget."""
    probed = probe(results, "baselines")
    if probed is None:
        return None
    blocks: list[Block] = [_table(probed)]
    blocks += _figure("baselines-perplexity", "Perplexity by budget", "perplexity", probed["rows"], _perplexity)
    blocks += _figure("baselines-recall", "Recall by budget", "recall", probed["rows"], _recall)
    return Section("Eviction without training", blocks)


def _table(probed: Row) -> Table:
    asked = dict.fromkeys(
        (task, length)
        for row in probed["rows"]
        for task, lengths in row["recall"].items()
        for length, _ in by_length(lengths)
    )
    rows = [
        (
            row["policy"],
            ABSENT if row["budget"] is None else str(row["budget"]),
            with_error(row, "perplexity"),
            *(share(row["recall"].get(task, {}).get(str(length))) for task, length in asked),
        )
        for row in probed["rows"]
    ]
    header = ("policy", "budget", "perplexity", *(f"{task}, {tokens(length)}" for task, length in asked))
    note = (
        f"The teacher with its attention in layers {ranges(probed['layers'])} replaced by a window of "
        f"{probed['window_tokens']} tokens and the retained ones of the budget "
        f"({probed['sink_tokens']} sinks among them). "
        "full: the teacher as it is; learned: the student's own eviction."
    )
    if probed.get("perplexity_from"):
        note += f" Perplexity is that of the tokens from position {probed['perplexity_from']} on."
    return Table("Policies at equal budgets", header, rows, note)


def _perplexity(row: Row) -> Point | None:
    if row["perplexity"] is None:
        return None
    reach = Z_95 * (row["perplexity_se"] or 0.0)
    return Point(float(row["budget"] or 0), row["perplexity"], row["perplexity"] - reach, row["perplexity"] + reach)


def _recall(row: Row) -> Point | None:
    found = pooled(cell for lengths in row["recall"].values() for cell in lengths.values())
    return None if found is None else Point(float(row["budget"] or 0), found)


def _figure(
    name: str, title: str, label: str, rows: list[Row], point: Callable[[Row], Point | None]
) -> Iterator[Block]:
    budgets = sorted({float(row["budget"]) for row in rows if row["budget"]})
    if not budgets:
        return
    series = []
    policies = [policy for policy in dict.fromkeys(row["policy"] for row in rows) if policy not in ("full", "learned")]
    kinds = {"full": "teacher dashed", "learned": "student"}
    kinds |= {policy: f"c{number % NUM_COLOURS}" for number, policy in enumerate(policies)}
    for policy, kind in kinds.items():
        points = [found for row in rows if row["policy"] == policy and (found := point(row)) is not None]
        if policy == "full" and points:
            points = [Point(budget, points[0].y) for budget in (budgets[0], budgets[-1])]
        if points:
            plain = policy == "full"
            series.append(Series(policy, kind, sorted(points, key=lambda p: p.x), marked=not plain))
    x = Axis("budget (retained tokens)", base=2, ticks=budgets, show=lambda value: str(round(value)))
    is_share = label == "recall"
    y = (
        Axis(label, low=0.0, high=1.0, show=lambda value: f"{value * 100:.0f} %")
        if is_share
        else Axis(label, show=rounded)
    )
    yield Figure(name, title, line_chart(title, series, x, y))
