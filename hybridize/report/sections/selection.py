"""Native sparse attention from inside: whether the selected blocks are those that the teacher attends to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from hybridize.report.blocks import Heat, HeatMap, Section
from hybridize.report.heat import by_head, share_heat
from hybridize.report.numbers import percent
from hybridize.report.results import Results, probe
from hybridize.report.tables import Table

_BRANCHES = ("compressed", "selected", "window")


def selection(results: Results) -> Section | None:
    """The teacher's attention in the selected blocks, against the best blocks of equal number; the branches' gates."""
    row = (probe(results, "inside") or {}).get("selection")
    if not row:
        return None
    rows = []
    for layer in row["layers"]:
        heads = layer["heads"]
        means = [_mean(head[name] for head in heads) for name in ("mass", "best")]
        gates = [statistics.fmean(head["gates"][name] for head in heads) for name in _BRANCHES]
        rows.append((str(layer["index"]), *map(percent, means), _over(*means), *(f"{gate:.3f}" for gate in gates)))
    header = ("layer", "selected", "best", "selected : best", *(f"{name} gate" for name in _BRANCHES))
    note = (
        "Share of the teacher's attention outside the window that lies in the selected blocks, and in the best blocks "
        f"of equal number; means over heads, {row['texts']} texts, {row['tokens']:,} tokens."
    )
    maps = [_gate_map(row, name) for name in _BRANCHES]
    if any(head["best"] for layer in row["layers"] for head in layer["heads"]):
        maps.insert(0, by_head("Selected, of the best possible (%)", row["layers"], _of_best))
    return Section("Native sparse attention", [Table("Selected blocks", header, rows, note), *maps])


def _mean(values: Iterable[float | None]) -> float | None:
    """None where a layer could not be compared: no teacher, or no text longer than the window."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _over(mass: float | None, best: float | None) -> str:
    return percent(mass / best) if mass is not None and best else percent(None)


def _of_best(head: Mapping[str, Any]) -> Heat | None:
    if not head["best"]:
        return None
    return share_heat(head["mass"] / head["best"], f"{head['mass']:.4f} of at best {head['best']:.4f}")


def _gate_map(row: Mapping[str, Any], name: str) -> HeatMap:
    return by_head(f"Gate of the {name} branch (%)", row["layers"], lambda head: share_heat(head["gates"][name]))
