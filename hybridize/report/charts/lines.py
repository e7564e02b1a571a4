"""Lines and points over two axes, with intervals."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from hybridize.report.charts.elements import WIDTH, drawing, element, line, shortened, text, words_width
from hybridize.report.charts.scale import Axis, Scale

_RIGHT, _PLOT, _ROW = 14, 190, 18


@dataclass(frozen=True)
class Point:
    """A value, with the ends of its interval if it has one, and a label beside it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one kind ("student", "teacher", "c0"...; a second word "faint" or "dashed" draws the line so)."""

    name: str
    kind: str
    points: Sequence[Point]
    joined: bool = True
    marked: bool = True


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, one: float | None = None) -> str:
    """A chart as an <svg> element.

    Args:
        series: drawn in order; those without a name are not in the legend.
        one: where a dashed line shows what the values are measured by ("as good as the teacher").
    """
    legend, top = _legend([item for item in series if item.name])
    bottom = top + _PLOT
    heights = [value for item in series for point in item.points for value in (point.y, point.low, point.high)]
    known = [value for value in heights if value is not None] + ([] if one is None else [one])
    up = y.scale(known, bottom - 8, top + 8)
    left = 30 + max(words_width(y.show(value)) for value in up.ticks())
    across = x.scale([point.x for item in series for point in item.points], left + 8, WIDTH - _RIGHT - 8)
    parts = [*legend, *_frame(x, y, across, up, (left, top, bottom))]
    if one is not None:
        parts.append(line(left, up(one), WIDTH - _RIGHT, up(one), "one"))
    for item in series:
        parts += _drawn(item, across, up)
    return drawing(title, bottom + 40, parts)


def _legend(series: Sequence[Series]) -> tuple[list[str], float]:
    """Names with their marks in as many rows as they need; and where the plot begins."""
    parts = []
    left, top = 4.0, 36.0
    for item in series:
        name = shortened(item.name, WIDTH - 40)
        width = words_width(name) + 34
        if left > 4 and left + width > WIDTH:
            left, top = 4.0, top + _ROW
        mark = line(left, top - 4, left + 14, top - 4, "line" + (" dashed" if "dashed" in item.kind else ""))
        if not item.joined:
            mark = element("circle", cx=left + 7, cy=top - 4, r=4, kind="mark")
        parts.append(element("g", mark, kind=item.kind.split()[0]) + text(name, left + 19, top))
        left += width
    return parts, top + 8 if series else 26


def _frame(x: Axis, y: Axis, across: Scale, up: Scale, box: tuple[float, float, float]) -> list[str]:
    left, top, bottom = box
    parts = []
    for value in up.ticks():
        parts.append(line(left, up(value), WIDTH - _RIGHT, up(value), "grid"))
        parts.append(text(y.show(value), left - 6, up(value) + 4, "soft end"))
    for value in across.ticks():
        parts.append(line(across(value), bottom, across(value), bottom + 4, "grid"))
        parts.append(text(x.show(value), across(value), bottom + 17, "soft mid"))
    parts.append(line(left, bottom, WIDTH - _RIGHT, bottom, "grid"))
    parts.append(text(x.label, (left + WIDTH - _RIGHT) / 2, bottom + 34, "soft mid"))
    turn = f"rotate(-90 12 {(top + bottom) / 2:.0f})"
    label = element("text", html.escape(y.label), x=12, y=round((top + bottom) / 2), kind="soft mid", transform=turn)
    return [*parts, label]


def _drawn(item: Series, across: Scale, up: Scale) -> list[str]:
    colour, *manner = item.kind.split()
    parts = []
    if item.joined and len(item.points) > 1:
        places = " ".join(f"{across(point.x):.1f},{up(point.y):.1f}" for point in item.points)
        parts.append(element("polyline", points=places, kind=" ".join(["line", *manner])))
    for point in item.points if item.marked else ():
        x, y = across(point.x), up(point.y)
        if point.low is not None or point.high is not None:
            high = up(up.high if point.high is None else point.high)
            low = up(up.low if point.low is None else point.low)
            parts += [line(x, low, x, high, "whisker"), line(x - 3, low, x + 3, low, "whisker")]
            parts.append(line(x - 3, high, x + 3, high, "whisker"))
        parts.append(element("circle", cx=x, cy=y, r=3.5, kind="mark"))
        if point.label:
            side = "end" if x > WIDTH * 0.7 else ""
            parts.append(text(point.label, x + (-7 if side else 7), y - 6, side))
    return [element("g", "".join(parts), kind=colour)]
