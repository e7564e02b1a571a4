"""results.json for people to read in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybridize.cli.format import table_lines

if TYPE_CHECKING:
    from rich.console import RenderableType


def results_parts(results: Mapping[str, Any]) -> list[RenderableType]:
    """The table of what was measured, what could not be, and what decoding costs by context."""
    from hybridize.report.render import inference_rows, summary_rows

    rows = [["measure", "student", "teacher", ""], *([str(cell) for cell in row] for row in summary_rows(results))]
    decoding = inference_rows(results)
    probes = results.get("probes", {})
    odd = [(name, probe) for name, probe in probes.items() if probe.get("status", "ok") != "ok"]
    return [
        *table_lines(rows, left=1),
        *(f"{name}: {probe['status']}: {probe.get('error', '')}" for name, probe in odd),
        *(["", *table_lines(decoding, left=1)] if decoding else ()),
    ]
