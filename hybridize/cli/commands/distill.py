"""hybridize distill."""

from __future__ import annotations

from pathlib import Path

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import dry_run_option, out_option, overwrite_option, read_recipe, recipe_argument


@make(
    name="distill",
    examples=(
        "hybridize distill recipe.yaml --out runs/one       again to go on after a stop",
        "hybridize distill recipe.yaml --out runs/two --set distill.stages.0.learning_rate=5e-4",
    ),
)
@recipe_argument
@out_option("The run folder.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out; refuse to start a new one.")
@overwrite_option
@dry_run_option
def command(
    settings: Settings,
    recipe_name: str,
    changes: tuple[str, ...],
    model: str | None,
    seed: int | None,
    out: Path,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Train the hybrid on its teacher, stage by stage.

    Converts first if that has not been done. Ctrl-C and SIGTERM save the state; the same command goes on. torchrun and
    accelerate launch start it on several devices; a run may go on with another number of them.
    """
    from hybridize.cli.plan_view import plan_parts
    from hybridize.cli.steps import convert_step, distill_step, first_goes_on, first_only, new_run_or_none, open_run
    from hybridize.errors import RecipeError, UsageError
    from hybridize.plan import plan
    from hybridize.recipe.lock import read_lock

    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other.", hint="Give one of them, or neither.")
    recipe = read_recipe(recipe_name, changes, model, seed)
    if recipe.distill is None or recipe.data is None:
        missing = "distill" if recipe.distill is None else "data"
        raise RecipeError(f"the recipe has no {missing!r}.", where=recipe_name, hint="Say stages and texts in it.")
    made = plan(recipe, offline=settings.offline)
    for warning in made.warnings:
        settings.output.warning(warning)
    if dry_run:
        settings.output.result("distill", {"dry_run": True, "plan": made.to_json()}, plan_parts(made))
        return
    if resume and read_lock(out) is None:
        raise UsageError("there is no run to go on with.", where=str(out), hint="Leave --resume out to start one.")
    reporter = settings.output.reporter()

    def begin() -> None:
        with new_run_or_none(out):
            open_run(out, recipe, made, overwrite=overwrite)
            convert_step(made, out, offline=settings.offline, reporter=reporter)

    first_only(begin, settings)
    adapter = distill_step(recipe, out, plan=made, offline=settings.offline, reporter=reporter)
    if not first_goes_on():
        return
    values = {"dry_run": False, "run": str(out), "adapter": str(adapter)}
    settings.output.result("distill", values, [f"{adapter}: trained; next: hybridize export {out} --out DIR"])
