"""hybridize plan."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import read_recipe, recipe_argument


@make(
    name="plan",
    examples=(
        "hybridize plan recipe.yaml",
        "hybridize plan recipe.yaml --set mixers.T.window_tokens=512",
        "hybridize plan llama-3.2-1b--linear-and-eviction --model ./my-llama --json",
        "hybridize plan recipe.yaml --calibrate",
    ),
)
@recipe_argument
@click.option(
    "--context", "contexts", type=click.IntRange(1), multiple=True, help="Context length to bill, in tokens (repeat)."
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Also write the plan as JSON.")
@click.option("--calibrate", is_flag=True, help="Predict time and memory of the distillation from a rehearsal here.")
@click.option(
    "--calibrate-seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the steps of the rehearsal may take, all together.",
)
def command(
    settings: Settings,
    recipe_name: str,
    changes: tuple[str, ...],
    model: str | None,
    seed: int | None,
    contexts: tuple[int, ...],
    out: Path | None,
    calibrate: bool,
    calibrate_seconds: float,
) -> None:
    """Show which layer gets which mixer, and what that costs.

    Reads config.json and tensor headers only: seconds, no weights, no GPU. With --calibrate a model of random weights
    takes a few steps of every stage on this machine's device, and tells what the whole distillation will take.
    """
    from hybridize.cli.plan_view import calibration_parts, plan_parts
    from hybridize.errors import UsageError
    from hybridize.plan import CONTEXTS, plan

    folder = None if out is None else out.absolute().parent
    if folder is not None and not folder.is_dir():
        raise UsageError("there is no such folder.", where=str(folder), hint="Make it, or choose another --out.")
    recipe = read_recipe(recipe_name, changes, model, seed)
    made = plan(recipe, offline=settings.offline, weights=False, contexts=contexts or CONTEXTS)
    values, parts = made.to_json(), plan_parts(made)
    for warning in made.warnings:
        settings.output.warning(warning)
    if calibrate:
        from hybridize.distillation.calibration import calibrate as rehearse

        base = recipe.origin.base if recipe.origin else None
        reporter = settings.output.reporter()
        found = rehearse(recipe, made, base=base, out=folder, seconds=calibrate_seconds, reporter=reporter)
        values["calibration"] = found.to_json()
        parts += ["", *calibration_parts(values["calibration"])]
        for problem in found.problems:
            settings.output.warning(problem)
    if out is not None:
        out.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    settings.output.result("plan", {"plan": values}, parts)
