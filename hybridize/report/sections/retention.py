"""Token eviction from inside: how full the budgets are, where retained tokens lie, who holds the needle."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from hybridize.report.blocks import Block, HeatMap, Section, Tokens
from hybridize.report.heat import by_head, share_heat
from hybridize.report.numbers import percent, rounded
from hybridize.report.results import Results, probe
from hybridize.report.tables import Table

_TENTHS = 10


def retention(results: Results) -> Section | None:
    """Retained tokens, the needle's tokens, and a text with what is held of it."""
    inside = probe(results, "inside")
    if inside is None:
        return None
    blocks: list[Block] = []
    if inside.get("retention"):
        blocks += _retained(inside["retention"])
    if inside.get("needles"):
        blocks += _needles(inside["needles"])
    if inside.get("shown"):
        blocks.append(Tokens(inside["shown"]))
    return Section("Token eviction", blocks)


def _retained(row: Mapping[str, Any]) -> Iterator[Block]:
    layers = row["layers"]
    rows = []
    for layer in layers:
        uses = [head["use"] for head in layer["heads"]]
        kept = statistics.fmean(head["kept"] for head in layer["heads"])
        cells = (
            str(layer["window_tokens"]),
            str(layer["budget_tokens"]),
            rounded(kept),
            percent(statistics.fmean(uses)),
        )
        rows.append((str(layer["index"]), *cells, f"{min(uses) * 100:.0f}-{max(uses) * 100:.0f} %"))
    header = ("layer", "window", "budget", "retained (mean)", "budget use", "use by head")
    note = (
        f"After reading {row['texts']} texts, {row['tokens']:,} tokens in all; retained means kept outside the window."
    )
    yield Table("Retained tokens", header, rows, note)
    yield by_head("Budget use (%)", layers, lambda head: share_heat(head["use"], f"{head['kept']:.2f} tokens retained"))
    columns = [f"{tenth * 10}-{tenth * 10 + 10}" for tenth in range(_TENTHS)]
    places = [(f"layer {layer['index']}", [*map(share_heat, _mean_places(layer))]) for layer in layers]
    note = "Per cent of the retained tokens in each tenth of the text before the window, mean of the heads."
    yield HeatMap("Where retained tokens lie", "% of text", columns, places, note)


def _mean_places(layer: Mapping[str, Any]) -> list[float]:
    return [statistics.fmean(shares) for shares in zip(*(head["places"] for head in layer["heads"]), strict=True)]


def _needles(row: Mapping[str, Any]) -> Iterator[Block]:
    rows = [
        (str(layer["index"]), percent(statistics.fmean(layer["heads"])), percent(max(layer["heads"])))
        for layer in row["layers"]
    ]
    note = (
        f"Share of the needle's tokens still held at the end of the prompt, over {row['texts']} prompts, "
        f"{row['tokens']:,} tokens in all: a needle that no head holds cannot be found through this layer."
    )
    yield Table("Who holds the needle", ("layer", "mean of heads", "best head"), rows, note)
    yield by_head("Needle held (%)", row["layers"], share_heat)
