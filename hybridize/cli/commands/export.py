"""hybridize export."""

from __future__ import annotations

from pathlib import Path

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import out_option, overwrite_option, parse_bytes


@make(
    name="export",
    examples=(
        "hybridize export runs/one --out my-hybrid",
        "hybridize export runs/one --out my-hybrid --dtype float32 --max-shard 2GB",
    ),
)
@click.argument("run", type=click.Path(path_type=Path))
@out_option("The folder to write.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Instead of the recipe's.")
@click.option("--max-shard", metavar="SIZE", help="Largest weight file, such as 5GB.")
@overwrite_option
def command(
    settings: Settings, run: Path, out: Path, dtype: str | None, max_shard: str | None, overwrite: bool
) -> None:
    """Write a run as an ordinary model folder that others can load.

    Merges the adapters, writes safetensors, code, card and manifest, and reads all of it back before the folder gets
    its name.
    """
    from dataclasses import replace
    from typing import Any

    from hybridize.recipe.lock import read_lock
    from hybridize.recipe.schema import Export

    lock = read_lock(run)
    chosen = lock.load(str(run)).export if lock else Export()
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes["dtype"] = dtype
    if max_shard is not None:
        changes["max_shard_bytes"] = parse_bytes(max_shard)
    from hybridize.model.export import export

    reporter = settings.output.reporter()
    folder = export(run, out, settings=replace(chosen, **changes), overwrite=overwrite, reporter=reporter)
    human = [f"{folder}: exported and read back"]
    settings.output.result("export", {"run": str(run), "folder": str(folder)}, human)
