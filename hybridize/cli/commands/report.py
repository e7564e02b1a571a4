"""hybridize report."""

from __future__ import annotations

from pathlib import Path

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make


@make(name="report", examples=("hybridize report runs/demo", "hybridize report results.json --out report"))
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Default: `report` beside the results.")
def command(settings: Settings, results: Path, out: Path | None) -> None:
    """Make tables and plots of results.json, or of a run folder.

    Needs neither a GPU nor torch.
    """
    import json

    from hybridize.cli.results_view import results_parts
    from hybridize.errors import UsageError
    from hybridize.report.render import render

    file = results / "results.json" if results.is_dir() else results
    if not file.is_file():
        raise UsageError("there are no results.", where=str(file), hint="`hybridize eval` or `run` makes them.")
    metrics = file.parent / "distill" / "metrics.jsonl"
    written = render(file, out or file.parent / "report", metrics if metrics.is_file() else None)
    values = {"files": [str(path) for path in written]}
    found = json.loads(file.read_text(encoding="utf-8"))
    settings.output.result("report", values, [*results_parts(found), "", *(str(path) for path in written)])
