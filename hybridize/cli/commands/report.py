"""hybridize report."""

from __future__ import annotations

from pathlib import Path

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make


@make(
    name="report",
    examples=(
        "hybridize report runs/demo                       tables, charts and one page of all of it",
        "hybridize report results.json --out report",
        "hybridize report runs/a runs/b --out comparison  models beside each other",
    ),
)
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Default: `report` beside the results; `comparison` here for several.",
)
def command(settings: Settings, results: tuple[Path, ...], out: Path | None) -> None:
    """Make tables, charts and a page of results.json, or of a run folder.

    Several are compared. Needs neither a GPU nor torch.
    """
    from hybridize.cli.results_view import results_parts
    from hybridize.report.render import render, render_comparison
    from hybridize.report.results import read_results

    files = [_results_file(path) for path in results]
    if len(files) > 1:
        written = render_comparison(files, out or Path("comparison"))
        shown = []
    else:
        metrics = files[0].parent / "distill" / "metrics.jsonl"
        written = render(files[0], out or files[0].parent / "report", metrics if metrics.is_file() else None)
        shown = [*results_parts(read_results(files[0])), ""]
    values = {"files": [str(path) for path in written]}
    settings.output.result("report", values, [*shown, *(str(path) for path in written)])


def _results_file(path: Path) -> Path:
    from hybridize.errors import UsageError

    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError("there are no results.", where=str(file), hint="`hybridize eval` or `run` makes them.")
    return file
