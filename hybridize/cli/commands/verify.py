"""hybridize verify."""

from __future__ import annotations

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make


@make(name="verify", examples=("hybridize verify runs/demo/export", "hybridize verify ./teacher --headers-only"))
@click.argument("model")
@click.option("--headers-only", is_flag=True, help="Skip reading the weights for NaN and Inf.")
def command(settings: Settings, model: str, headers_only: bool) -> None:
    """Check hashes, tensor shapes, and that all is finite.

    A folder of ours is held against its manifest; exit 7 if they differ.
    """
    from hybridize.cli.verify_view import verify_model

    report = verify_model(model, offline=settings.offline, finite=not headers_only)
    for warning in report["warnings"]:
        settings.output.warning(warning)
    checked = f"{report['files']} files match the manifest, " if report["manifest"] else "no manifest of ours, "
    finite = "" if headers_only else ", all finite"
    human = [f"{model}: {checked}{report['tensors']} tensors{finite}"]
    settings.output.result("verify", report, human)
