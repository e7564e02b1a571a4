"""What is lost when a mixer is replaced by a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridize.report.blocks import Block, Figure, Section
from hybridize.report.charts.rows import Bar, row_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.charts.style import NUM_COLOURS
from hybridize.report.numbers import ranges, rounded, with_error
from hybridize.report.results import Results, probe
from hybridize.report.tables import Row, Table
from hybridize.report.verdict import Z_95

_EXTREMES = 5
_HEADER = ("KL change (nats a token)", "KL", "perplexity")


def ablation(results: Results) -> Section | None:
    """By mixer, the layers that matter least and most, and every layer as a bar."""
    row = probe(results, "ablation")
    if row is None:
        return None
    blocks: list[Block] = [_by_mixer(row)]
    if row["layers"]:
        blocks += [*_extremes(row["layers"]), _figure(row["layers"])]
    return Section("Ablation", blocks)


def _by_mixer(row: Mapping[str, Any]) -> Table:
    whole = row["whole"]
    rows: list[Row] = [("nothing (the student as it is)", "0", rounded(whole["kl"]), f"{whole['perplexity']:.2f}")]
    rows += [(f"{part['mixer']} (layers {ranges(part['layers'])})", *_cells(part)) for part in row["mixers"]]
    note = (
        f"Each mixer in all its layers replaced by a window of {row['window_tokens']} tokens, or by its own. "
        f"A change near zero means that the model does without it. "
        f"{row['tokens']:,} tokens in {row['windows']} windows."
    )
    return Table("Ablation by mixer", ("replaced by a window", *_HEADER), rows, note)


def _cells(part: Mapping[str, Any]) -> tuple[str, ...]:
    return with_error(part, "kl_change", 4), with_error(part, "kl", 4), f"{part['perplexity']:.2f}"


def _extremes(layers: list[Mapping[str, Any]]) -> list[Table]:
    ranked = sorted(layers, key=lambda layer: layer["kl_change"])
    header = ("layer", *_HEADER)

    def rows(chosen: list[Mapping[str, Any]]) -> list[tuple[str, ...]]:
        return [(f"{layer['index']}, {layer['mixer']}", *_cells(layer)) for layer in chosen]

    if len(ranked) <= 2 * _EXTREMES:
        return [Table("Ablation by layer", header, rows(ranked[::-1]))]
    return [
        Table("Layers that matter most", header, rows(ranked[: -_EXTREMES - 1 : -1])),
        Table("Layers that matter least", header, rows(ranked[:_EXTREMES])),
    ]


def _figure(layers: list[Mapping[str, Any]]) -> Figure:
    mixers = list(dict.fromkeys(layer["mixer"] for layer in layers))
    bars = []
    for layer in layers:
        change, error = layer["kl_change"], layer["kl_change_se"]
        low, high = (None, None) if error is None else (change - Z_95 * error, change + Z_95 * error)
        kind = f"c{mixers.index(layer['mixer']) % NUM_COLOURS}"
        bars.append(Bar(f"{layer['index']} {layer['mixer']}", change, low, high, rounded(change, 2), kind))
    title = "KL change when one layer becomes a window"
    return Figure("ablation", title, row_chart(title, bars, Axis("nats a token (95 % interval)"), one=0.0, filled=True))
