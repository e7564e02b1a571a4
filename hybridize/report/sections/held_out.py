"""What the models say of held-out text: perplexity, agreement, and how long their continuations agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridize.report.blocks import Block, Figure, Section
from hybridize.report.charts.lines import Point, Series, line_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.numbers import percent, share, tokens, with_error
from hybridize.report.results import Results, probe
from hybridize.report.tables import Table
from hybridize.report.verdict import Z_95


def held_out(results: Results) -> Section:
    """Perplexity, agreement and continuations, by source and position."""
    blocks: list[Block] = []
    if ppl := probe(results, "perplexity"):
        blocks += _perplexity(ppl)
    if close := probe(results, "agreement"):
        blocks.append(_agreement(close))
    if same := probe(results, "continuation"):
        blocks += _continuation(same)
    return Section("Held-out text", blocks)


def _perplexity(ppl: Mapping[str, Any]) -> Iterator[Block]:
    rows = [(f"{row['from']}-{row['to']}", *_perplexity_cells(row)) for row in ppl["by_position"]]
    yield Table("Perplexity by position", ("tokens before", "student", "teacher", "ratio", "tokens"), rows)
    if ppl["by_position"]:
        yield _perplexity_figure(ppl["by_position"])
    rows = [(name, *_perplexity_cells(row)) for name, row in ppl["by_source"].items()]
    yield Table("Perplexity by source", ("source", "student", "teacher", "ratio", "tokens"), rows)


def _perplexity_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (with_error(row, "student"), with_error(row, "teacher"), with_error(row, "ratio", 3), f"{row['tokens']:,}")


def _perplexity_figure(rows: list[Mapping[str, Any]]) -> Figure:
    series = [
        Series(
            name,
            name,
            [
                Point(float(place), row[name], row[name] - error, row[name] + error)
                for place, row in enumerate(rows)
                if row[name] is not None
                for error in [Z_95 * (row[f"{name}_se"] or 0.0)]
            ],
        )
        for name in ("teacher", "student")
        if rows[0][name] is not None
    ]
    labels = [f"{tokens(row['from'])}-{tokens(row['to'])}" for row in rows]
    x = Axis("position (tokens)", ticks=[float(n) for n in range(len(rows))], show=lambda value: labels[round(value)])
    title = "Perplexity by position"
    return Figure("perplexity", title, line_chart(title, series, x, Axis("perplexity")))


def _agreement(close: Mapping[str, Any]) -> Table:
    named = [("all", close), *close["by_source"].items()]
    named += [(f"tokens {row['from']}-{row['to']}", row) for row in close["by_position"]]
    rows = [
        (name, with_error(row, "kl", 3), with_error(row, "top1", 1, 100.0) + " %", f"{row['tokens']:,}")
        for name, row in named
    ]
    return Table("Agreement with the teacher", ("text", "KL (nats a token)", "same first token", "tokens"), rows)


def _continuation(same: Mapping[str, Any]) -> Iterator[Block]:
    rows = [
        ("tokens in common (mean)", with_error(same, "same_tokens", 1)),
        ("tokens in common (median)", f"{same['median']:g}"),
        (f"all {same['new_tokens']} in common", share(same["whole"])),
        *((f"at least {row['tokens']} in common", percent(row["share"])) for row in same["curve"]),
    ]
    note = f"Greedy continuations of {same['prompts']} prompts of {same['prompt_tokens']} tokens of held-out text."
    yield Table("Continuations in common with the teacher", ("", "prompts or tokens"), rows, note)
    if len(same["curve"]) > 1:
        points = [Point(float(row["tokens"]), row["share"]) for row in same["curve"]]
        x = Axis("tokens written", base=2, ticks=[p.x for p in points], show=lambda value: str(round(value)))
        y = Axis("prompts", low=0.0, high=1.0, show=lambda value: f"{value * 100:.0f} %")
        title = "Continuations still the teacher's"
        yield Figure("continuation", title, line_chart(title, [Series("", "student", points)], x, y))
