"""Writes the report: report.md and its plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridize.checkpoint.resources import resource_errors
from hybridize.files import write_whole
from hybridize.report.plots import all_plots, has_matplotlib
from hybridize.report.prose import samples_section, training_section, verdict
from hybridize.report.results import Results, check_results, read_metrics, read_results
from hybridize.report.tables import SUMMARY_HEADER, Row, all_tables, markdown, summary

REPORT_FILE = "report.md"
_PLOT_TITLES = {
    "perplexity.png": "Perplexity by position",
    "recall.png": "Recall by length and depth",
    "state-bytes.png": "State bytes over context length",
    "training.png": "Loss by stage",
}
_NO_PLOTS = 'No plots: matplotlib is not installed. Install it with `pip install "hybridize[plots]"` and report again.'


def render(results: Results | Path, out: Path, metrics: Path | None = None) -> list[Path]:
    """Writes the report of an evaluation.

    Args:
        results: results.json, or its content.
        out: folder of the report; files of an earlier report are replaced.
        metrics: the metrics.jsonl of the distillation, for the loss curves.

    Returns:
        The written files, report.md first.

    Raises:
        UsageError: the results or metrics cannot be read.
        ResourceError: disk, quota or permission.
    """
    found = read_results(results) if isinstance(results, Path) else check_results(results)
    steps = None if metrics is None else read_metrics(metrics)
    plots = all_plots(found, steps) if has_matplotlib() else {}
    text = report_markdown(found, steps, list(plots))
    with resource_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        written = [write_whole(out / name, png) for name, png in plots.items()]
        return [write_whole(out / REPORT_FILE, text), *written]


def report_markdown(
    results: Results, metrics: Mapping[str, Sequence[Mapping[str, Any]]] | None, plot_names: Sequence[str]
) -> str:
    """The report as Markdown; `plot_names` are the files that stand beside it."""
    parts = [f"# {_name(results['model'])}", verdict(results)]
    parts += [markdown(table) for table in all_tables(results)]
    if plot_names:
        parts += ["## Plots", *(f"![{_PLOT_TITLES[name]}]({name})" for name in plot_names)]
    if not has_matplotlib():
        parts.append(_NO_PLOTS)
    parts += [samples_section(results), training_section(metrics or {}), _provenance(results)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def summary_rows(results: Results) -> list[Row]:
    """The rows of the summary table as texts (label, student, teacher, student : teacher)."""
    return list(summary(check_results(results)).rows)


def _name(model: Mapping[str, Any]) -> str:
    """The last part of the folder's name that tells one model from another: "demo" of runs/demo/export."""
    parts = [part for part in str(model["spec"]).split("/") if part]
    return parts[-2] if len(parts) > 1 and parts[-1] == "export" else parts[-1]


def _provenance(results: Results) -> str:
    origin, teacher = results["provenance"], results["teacher"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    lines = [
        "## How this was measured",
        "",
        f"- model `{_name(results['model'])}`, fingerprint `{results['model']['fingerprint'][:16]}`",
    ]
    if teacher is not None:
        lines.append(f"- teacher `{_name(teacher)}`, fingerprint `{teacher['fingerprint'][:16]}`")
    lines += [
        f"- {origin['created']}, {origin['device']}, {origin['dtype']}, seed {origin['seed']}",
        f"- {len(origin['documents'])} held-out documents; their SHA-256 are in results.json",
        f"- {versions}, Python {origin['python']}",
    ]
    return "\n".join(lines)


__all__ = ["REPORT_FILE", "SUMMARY_HEADER", "render", "report_markdown", "summary_rows"]
