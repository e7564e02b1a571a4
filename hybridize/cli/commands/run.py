"""hybridize run."""

from __future__ import annotations

from pathlib import Path

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import dry_run_option, out_option, overwrite_option, read_recipe, recipe_argument


@make(
    name="run",
    examples=(
        "hybridize run smollm2-135m--demo --out runs/demo     again to go on after a stop",
        "hybridize run recipe.yaml --out runs/one --dry-run   the plan only",
    ),
)
@recipe_argument
@out_option("The run folder.")
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
    """Do all of the steps below, in order.

    What is complete is kept, so the same command goes on after a stop.
    """
    from hybridize.cli import steps
    from hybridize.cli.plan_view import plan_parts
    from hybridize.plan import plan
    from hybridize.recipe.lock import read_lock

    output = settings.output
    recipe = read_recipe(recipe_name, changes, model, seed)
    made = plan(recipe, offline=settings.offline)
    for warning in made.warnings:
        output.warning(warning)
    if dry_run:
        output.result("run", {"dry_run": True, "plan": made.to_json()}, plan_parts(made))
        return
    reporter = output.reporter()

    def begin() -> None:
        with steps.new_run_or_none(out):
            steps.open_run(out, recipe, made, overwrite=overwrite)
            steps.convert_step(made, out, offline=settings.offline, reporter=reporter)

    steps.first_only(begin, settings)
    if recipe.distill is not None and recipe.data is not None:
        steps.distill_step(recipe, out, plan=made, offline=settings.offline, reporter=reporter)
    if not steps.first_goes_on():
        return
    lock = read_lock(out)
    assert lock is not None  # the run was opened above
    final = steps.export_step(recipe, out, reporter=reporter)
    results = steps.evaluate_step(
        recipe, out, lock, model=final, teacher=made.teacher, offline=settings.offline, reporter=reporter
    )
    written = steps.report_step(out)
    from hybridize.cli.results_view import results_parts

    values = {
        "dry_run": False,
        "run": str(out),
        "model": str(final),
        "results": results,
        "report": [str(path) for path in written],
    }
    page = next((path for path in written if path.suffix == ".html"), None)
    human = [*results_parts(results), "", f"model    {final}", f"report   {page}" if page else ""]
    output.result("run", values, human)
