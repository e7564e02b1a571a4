"""Writes reports: report.md and its charts, and report.html, which holds all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybridize.checkpoint.resources import resource_errors
from hybridize.files import write_whole
from hybridize.report import markdown
from hybridize.report.blocks import Figure, Section
from hybridize.report.charts.style import standalone
from hybridize.report.comparison import comparison_sections
from hybridize.report.names import model_name
from hybridize.report.page.document import document
from hybridize.report.results import Results, check_results, read_metrics, read_results
from hybridize.report.sections import all_sections
from hybridize.report.tables import DECODE_HEADER, SUMMARY_HEADER, Row, decode_rows, summary

REPORT = "report"
COMPARISON = "comparison"


def render(results: Results | Path, out: Path, metrics: Path | None = None) -> list[Path]:
    """Writes the report of an evaluation.

    Args:
        results: results.json, or its content.
        out: folder of the report; files of an earlier report are replaced.
        metrics: the metrics.jsonl of the distillation, for the loss curves.

    Returns:
        The written files: report.md, report.html, and the charts (SVG) that report.md shows.

    Raises:
        UsageError: the results or metrics cannot be read.
        ResourceError: disk, quota or permission.
    """
    found = _read(results)
    steps = None if metrics is None else read_metrics(metrics)
    return _write(out, REPORT, model_name(found["model"]), all_sections(found, steps))


def render_comparison(results: Sequence[Results | Path], out: Path) -> list[Path]:
    """Writes a comparison of several evaluations: comparison.md, comparison.html and its charts.

    Raises:
        UsageError: results cannot be read.
        ResourceError: disk, quota or permission.
    """
    return _write(out, COMPARISON, "Comparison", comparison_sections([_read(one) for one in results]))


def summary_rows(results: Results) -> list[Row]:
    """The rows of the summary table as texts (label, student, teacher, student : teacher)."""
    return list(summary(check_results(results)).rows)


def inference_rows(results: Results) -> list[Row]:
    """Time and state of decoding by context, with a header; empty where nothing was timed."""
    rows = decode_rows(check_results(results))
    return [DECODE_HEADER, *rows] if rows else []


def _read(results: Results | Path) -> Results:
    return read_results(results) if isinstance(results, Path) else check_results(results)


def _write(out: Path, name: str, title: str, sections: Sequence[Section]) -> list[Path]:
    figures = [block for section in sections for block in section.blocks if isinstance(block, Figure)]
    texts = {
        f"{name}.md": markdown.document(title, sections),
        f"{name}.html": document(title, sections),
        **{f"{figure.name}.svg": standalone(figure.svg) for figure in figures},
    }
    with resource_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        return [write_whole(out / file, text) for file, text in texts.items()]


__all__ = ["SUMMARY_HEADER", "inference_rows", "render", "render_comparison", "summary_rows"]
