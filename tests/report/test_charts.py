from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.report.charts.elements import WIDTH, shortened
from hybridize.report.charts.lines import Point, Series, line_chart
from hybridize.report.charts.rows import Bar, row_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.charts.style import standalone

Row = tuple[float, float | None, float | None]
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 9))


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.-]+)" cy="([\d.-]+)" r="3.5"', svg)]


def test_points_stand_where_their_numbers_say() -> None:
    svg = line_chart("t", [Series("a", "student", [Point(0, 0), Point(1, 1), Point(2, 4)])], Axis("x"), Axis("y"))
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y1) * 4 == pytest.approx(y0 - y2, abs=0.5)
    assert y2 < y1 < y0


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors() -> None:
    points = [Point(2.0**n, 8.0**n) for n in range(3)]
    svg = line_chart("t", [Series("a", "c0", points)], Axis("x", base=2), Axis("y", base=10))
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.sampled_from([None, 2, 10]))
def test_property_every_value_lies_on_the_scale_and_so_do_its_ticks(values: list[float], base: int | None) -> None:
    if base is not None:
        values = [abs(value) + 1e-3 for value in values]
    scale = Axis("a", base=base).scale(values, 10.0, 110.0)
    places = [scale(value) for value in values]
    assert all(9.99 <= place <= 110.01 for place in places)
    ordered = [place for _, place in sorted(zip(values, places, strict=True))]
    assert ordered == sorted(ordered)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(scale.low - 1e-6 * abs(scale.low) <= tick <= scale.high + 1e-6 * abs(scale.high) for tick in ticks)


@given(st.lists(st.tuples(NUMBERS, st.none() | NUMBERS, st.none() | NUMBERS), min_size=1, max_size=5), st.booleans())
def test_property_charts_are_xml_within_their_box(rows: list[Row], on: bool) -> None:
    points = [Point(float(i), value, low, high, "a<b") for i, (value, low, high) in enumerate(rows)]
    bars = [Bar(f"<{i}>&", value, low, high, f"{value:.1g}") for i, (value, low, high) in enumerate(rows)]
    axis = Axis("x & y", low=0.0, high=1.5) if on else Axis("x & y")
    series = [Series("a & <b>" * 9, "student dashed", points, joined=on)]
    for svg in (line_chart("<t>", series, Axis("x"), axis, one=1.0), row_chart("<t>", bars, axis, one=1.0, filled=on)):
        root = ET.fromstring(standalone(svg))
        height = float(root.attrib["viewBox"].split()[3])
        for node in root.iter():
            for name, value in node.attrib.items():
                if name in ("x", "x1", "x2", "cx", "y", "y1", "y2", "cy"):
                    assert -1 <= float(value) <= (WIDTH if "x" in name else height) + 1


def test_an_interval_without_an_end_reaches_the_edge() -> None:
    closed, opened = (
        row_chart("t", [Bar("a", 0.5, 0.25, high, "x")], Axis("a", low=0.0, high=1.0), one=1.0, filled=False)
        for high in (0.75, None)
    )
    ends = [re.search(r'x2="([\d.]+)" y2="[\d.]+" class="whisker"', svg) for svg in (closed, opened)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert float(ends[1][1]) > float(ends[0][1])


def test_names_are_cut_in_the_middle() -> None:
    assert shortened("short", 100) == "short"
    cut = shortened("gated_delta_net_of_layer_12", 64)
    assert len(cut) == 10
    assert cut.startswith("gated")
    assert cut.endswith("r_12")


def test_a_file_carries_its_style_and_follows_the_dark() -> None:
    svg = line_chart("t", [Series("", "student", [Point(1, 1)])], Axis("x"), Axis("y"))
    assert "<style>" not in svg
    text = standalone(svg)
    assert "prefers-color-scheme:dark" in text
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


def test_an_axis_without_values_still_has_a_scale() -> None:
    for base in (None, 2):
        scale = Axis("nothing", base=base).scale([], 0.0, 100.0)
        assert scale.ticks()
        assert 0.0 <= scale(scale.low) < scale(scale.high) <= 100.0
