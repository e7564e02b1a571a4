"""The gated delta rule from inside: decays, half lives and gates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hybridize.report.blocks import Heat, Section
from hybridize.report.heat import by_head, level_heat, share_heat
from hybridize.report.numbers import ABSENT, rounded
from hybridize.report.results import Results, probe
from hybridize.report.tables import Table


def gates(results: Results) -> Section | None:
    """How long each head remembers, and how open its gates are."""
    row = (probe(results, "inside") or {}).get("gates")
    if not row:
        return None
    layers = row["layers"]
    known = [head["half_life_tokens"] for layer in layers for head in layer["heads"] if head["half_life_tokens"]]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)

    def half_life(head: Mapping[str, Any]) -> Heat | None:
        return level_heat(head["half_life_tokens"], low, high) if head["half_life_tokens"] else None

    rows = [(str(layer["index"]), *_cells(layer["heads"])) for layer in layers]
    header = ("layer", "half life (tokens): shortest, median, longest", "decay", "beta", "output gate")
    note = f"Medians of the half life and means of the rest, over {row['tokens']:,} tokens of held-out text."
    maps = [by_head("Half life (tokens)", layers, half_life, "Coloured on a logarithmic scale.")]
    maps.append(by_head("Beta (%)", layers, lambda head: share_heat(head["beta"])))
    if all(head["output_gate"] is not None for layer in layers for head in layer["heads"]):
        maps.append(by_head("Output gate (%)", layers, lambda head: share_heat(head["output_gate"])))
    return Section("Gated delta rule", [Table("Decay and gates", header, rows, note), *maps])


def _cells(heads: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    lives = [head["half_life_tokens"] for head in heads if head["half_life_tokens"] is not None]
    spread = (min(lives), statistics.median(lives), max(lives)) if lives else ()
    means = []
    for name, digits in (("decay", 4), ("beta", 3), ("output_gate", 3)):
        values = [head[name] for head in heads if head[name] is not None]
        means.append(rounded(statistics.fmean(values), digits) if values else ABSENT)
    return (", ".join(map(rounded, spread)) or ABSENT, *means)
