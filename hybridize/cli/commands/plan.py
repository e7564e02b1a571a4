"""hybridize plan."""

from __future__ import annotations

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
    ),
)
@recipe_argument
@click.option(
    "--context", "contexts", type=click.IntRange(1), multiple=True, help="Context length to bill, in tokens (repeat)."
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Also write the plan as JSON.")
def command(
    settings: Settings,
    recipe_name: str,
    changes: tuple[str, ...],
    model: str | None,
    seed: int | None,
    contexts: tuple[int, ...],
    out: Path | None,
) -> None:
    """Show which layer gets which mixer, and what that costs.

    Reads config.json and tensor headers only: seconds, no weights, no GPU.
    """
    from hybridize.cli.plan_view import plan_parts
    from hybridize.plan import CONTEXTS, plan

    recipe = read_recipe(recipe_name, changes, model, seed)
    made = plan(recipe, offline=settings.offline, weights=False, contexts=contexts or CONTEXTS)
    if out is not None:
        made.save(out)
    for warning in made.warnings:
        settings.output.warning(warning)
    settings.output.result("plan", {"plan": made.to_json()}, plan_parts(made))
