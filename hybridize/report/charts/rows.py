"""Horizontal bars or points with intervals: a row for each label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridize.report.charts.elements import WIDTH, drawing, element, line, shortened, text, words_width
from hybridize.report.charts.scale import Axis, Scale

_TOP, _ROW, _WIDEST_LABEL = 30, 20, 170


@dataclass(frozen=True)
class Bar:
    """A row: its value, the ends of its interval (None: open), the number as it is written, and the kind."""

    label: str
    value: float
    low: float | None
    high: float | None
    written: str
    kind: str = "student"


def row_chart(title: str, bars: Sequence[Bar], axis: Axis, *, one: float, filled: bool) -> str:
    """A chart as an <svg> element.

    Args:
        one: the value that the rows are compared with (a dashed line); bars begin there.
        filled: bars; else points.
    """
    left = min(_WIDEST_LABEL, max(words_width(bar.label) for bar in bars)) + 10
    right = WIDTH - max(words_width(bar.written) for bar in bars) - 10
    known = [value for bar in bars for value in (bar.value, bar.low, bar.high) if value is not None]
    if axis.low is not None and axis.high is not None:
        known = [min(max(value, axis.low), axis.high) for value in known]
    across = axis.scale([*known, one], left + 4, right - 4)
    bottom = _TOP + _ROW * len(bars)
    parts = []
    for value in across.ticks(4):
        parts.append(line(across(value), _TOP - 4, across(value), bottom, "grid"))
        parts.append(text(axis.show(value), across(value), bottom + 15, "soft mid"))
    parts.append(line(across(one), _TOP - 4, across(one), bottom, "one"))
    for number, bar in enumerate(bars):
        parts.append(_row(bar, _TOP + _ROW * number + _ROW / 2, left, across, one, filled))
    parts.append(text(axis.label, (left + right) / 2, bottom + 32, "soft mid"))
    return drawing(title, bottom + 40, parts)


def _row(bar: Bar, middle: float, left: float, across: Scale, one: float, filled: bool) -> str:
    label = text(shortened(bar.label, left - 10), left - 6, middle + 4, "end")
    ends = sorted((across(one), across(bar.value)))
    if filled:
        mark = element("rect", x=ends[0], y=middle - 6, width=max(ends[1] - ends[0], 1.0), height=12, kind="bar")
    else:
        mark = element("circle", cx=across(bar.value), cy=middle, r=4, kind="mark")
    whisker = ""
    if bar.low is not None or bar.high is not None:
        low = across(across.low if bar.low is None else bar.low)
        high = across(across.high if bar.high is None else bar.high)
        whisker = line(low, middle, high, middle, "whisker")
    number = text(bar.written, WIDTH - 4, middle + 4, "soft end")
    return label + element("g", mark + whisker, kind=bar.kind) + number
