"""The course of the training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridize.report.blocks import Figure, Section
from hybridize.report.charts.lines import Point, Series, line_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.sparkline import means, sparkline
from hybridize.report.tables import Table

Steps = Sequence[Mapping[str, Any]]

_POINTS = 200
_SMOOTH_POINTS = 30


def training(metrics: Mapping[str, Steps]) -> Section | None:
    """A line for each stage: steps, the loss as a curve, first and last loss, speed; and the curves as charts."""
    finite = {name: [row for row in rows if math.isfinite(row["loss"])] for name, rows in metrics.items()}
    stages = {name: rows for name, rows in finite.items() if rows}
    if not stages:
        return None
    header = ("stage", "steps", "loss", "first", "last", "tokens/s")
    table = Table("Loss by stage", header, [_row(name, rows) for name, rows in stages.items()])
    return Section("Training", [table, *_figures(stages)])


def _row(name: str, rows: Steps) -> tuple[str, ...]:
    losses = [float(row["loss"]) for row in rows]
    speeds = [float(row["tokens_per_s"]) for row in rows if "tokens_per_s" in row]
    speed = f"{sum(speeds) / len(speeds):,.0f}" if speeds else "-"
    return name, str(rows[-1]["stage_step"]), sparkline(losses, 24), f"{losses[0]:.4g}", f"{losses[-1]:.4g}", speed


def _figures(stages: Mapping[str, Steps]) -> Iterator[Figure]:
    for number, (name, rows) in enumerate(stages.items(), 1):
        steps, losses = [float(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
        steep = min(losses) > 0 and max(losses) > 10 * min(losses)
        series = [
            Series("", f"student {manner}".strip(), _curve(steps, losses, points), marked=False)
            for manner, points in (("faint", _POINTS), ("", _SMOOTH_POINTS))
        ]
        title = f"Loss, {name}"
        x = Axis("step", show=lambda value: f"{value:,.0f}")
        yield Figure(f"loss-{number}", title, line_chart(title, series, x, Axis("loss", base=10 if steep else None)))


def _curve(steps: Sequence[float], losses: Sequence[float], points: int) -> list[Point]:
    return [Point(step, loss) for step, loss in zip(means(steps, points), means(losses, points), strict=True)]
