"""hybridize eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import read_recipe

PROBES = ("perplexity", "recall", "agreement", "samples")


@make(
    name="eval",
    examples=(
        "hybridize eval runs/demo/export --recipe smollm2-135m--demo --out results.json",
        "hybridize eval my-hybrid --text 'held-out/*.txt' --probe perplexity --against ./teacher",
        "hybridize eval my-hybrid --recipe recipe.yaml --gate 'perplexity.ratio<=1.5'   (exit 7 if not)",
    ),
)
@click.argument("model")
@click.option("--recipe", "recipe_name", metavar="RECIPE", help="Takes probes, texts and teacher from a recipe.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe.")
@click.option("--text", "texts", multiple=True, metavar="PATH", help="Held-out text (repeat); instead of the recipe's.")
@click.option("--against", "teacher", metavar="MODEL", help="The teacher; default: the one the hybrid was made from.")
@click.option("--alone", is_flag=True, help="Measure the model without a teacher.")
@click.option("--probe", "probes", multiple=True, type=click.Choice(PROBES), help="Only this probe (repeat).")
@click.option("--gate", "gates", multiple=True, metavar="CONDITION", help="Exit 7 unless it holds (repeat).")
@click.option("--seed", type=int, help="Seed of needles and keys; default: the recipe's, or 0.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write results.json here.")
@click.option("--overwrite", is_flag=True, help="Replace the file given with --out.")
def command(
    settings: Settings,
    model: str,
    recipe_name: str | None,
    changes: tuple[str, ...],
    texts: tuple[str, ...],
    teacher: str | None,
    alone: bool,
    probes: tuple[str, ...],
    gates: tuple[str, ...],
    seed: int | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Measure a model against its teacher.

    Perplexity by position, needle recall, agreement, state bytes and samples.
    """
    from dataclasses import replace

    from hybridize.cli.results_view import results_parts
    from hybridize.errors import UsageError
    from hybridize.recipe.lock import recipe_sha256
    from hybridize.recipe.probes import Evaluate
    from hybridize.recipe.sources import TextSource

    recipe = read_recipe(recipe_name, changes, None, None) if recipe_name else None
    if changes and recipe is None:
        raise UsageError("--set changes a recipe, and none is given.", hint="Add --recipe.")
    if not texts and (recipe is None or recipe.data is None):
        raise UsageError("nothing says which texts to measure on.", hint="Give --recipe or --text.")
    if out is not None and out.exists() and not overwrite:
        raise UsageError("the file is there already.", where=str(out), hint="Choose another --out, or --overwrite.")
    wishes = recipe.evaluate if recipe else Evaluate()
    left_out: dict[str, Any] = {name: None for name in PROBES if probes and name not in probes}
    wishes = replace(wishes, **left_out)
    held_out: Any = tuple(TextSource(path) for path in texts) or (recipe.data if recipe else ())
    from hybridize.evaluation.gates import gate, parse_condition
    from hybridize.evaluation.runner import evaluate

    for condition in gates:
        parse_condition(condition)
    results = evaluate(
        model,
        teacher=None if alone else teacher or _teacher_of(model) or (recipe.model if recipe else None),
        recipe_evaluate=wishes,
        held_out=held_out,
        base=Path() if texts or recipe is None or recipe.origin is None else recipe.origin.base,
        out=out,
        reporter=settings.output.reporter(),
        seed=seed if seed is not None else recipe.seed if recipe else 0,
        offline=settings.offline,
        recipe_sha256=recipe_sha256(recipe) if recipe else None,
        command="hybridize eval",
    )
    if gates:
        gate(results, *gates)
    where = [f"written to {out}"] if out else []
    settings.output.result("eval", {"results": results, "gates": list(gates)}, [*results_parts(results), *where])


def _teacher_of(model: str) -> str | None:
    """The teacher named in a hybrid's plan.json."""
    from hybridize.plan import ConversionPlan

    path = Path(model) / "plan.json"
    return ConversionPlan.load(path).teacher if path.is_file() else None
