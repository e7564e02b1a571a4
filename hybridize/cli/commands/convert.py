"""hybridize convert."""

from __future__ import annotations

from pathlib import Path

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import dry_run_option, out_option, overwrite_option, read_recipe, recipe_argument


@make(
    name="convert",
    examples=(
        "hybridize convert recipe.yaml --out hybrid",
        "hybridize convert recipe.yaml --out hybrid --dry-run",
    ),
)
@recipe_argument
@out_option("The folder to write.")
@overwrite_option
@dry_run_option
def command(
    settings: Settings,
    recipe_name: str,
    changes: tuple[str, ...],
    model: str | None,
    seed: int | None,
    out: Path,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Put the mixers in place of attention; no training.

    Writes a loadable checkpoint. No GPU is needed.
    """
    from hybridize.cli.plan_view import plan_parts
    from hybridize.plan import plan

    recipe = read_recipe(recipe_name, changes, model, seed)
    made = plan(recipe, offline=settings.offline)
    for warning in made.warnings:
        settings.output.warning(warning)
    if dry_run:
        settings.output.result("convert", {"dry_run": True, "plan": made.to_json()}, plan_parts(made))
        return
    from hybridize.model.convert import convert

    reporter = settings.output.reporter()
    folder = convert(made, out, overwrite=overwrite, offline=settings.offline, reporter=reporter)
    values = {"dry_run": False, "folder": str(folder), "converted_layers": list(made.converted)}
    human = [f"{folder}: {len(made.converted)} of {len(made.layers)} layers converted"]
    settings.output.result("convert", values, human)
