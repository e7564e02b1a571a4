"""hybridize eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import read_recipe
from hybridize.cli.wishes import PROBES, SUITES, Wishes

TEXTS = "text/held-out/*.txt"
"""Below the shipped recipes: read where nothing says which texts to measure on."""


@make(
    name="eval",
    examples=(
        "hybridize eval my-hybrid --suite standard --out results.json",
        "hybridize eval my-hybrid --text 'held-out/*.txt' --probe perplexity --against ./teacher",
        "hybridize eval runs/demo/export --recipe smollm2-135m--demo --out results.json",
        "hybridize eval my-hybrid --harness arc_easy,hellaswag",
        "hybridize eval my-hybrid --gate 'recall@4096>=0.9,ppl_ratio<=1.05'   (exit 7 if not)",
    ),
)
@click.argument("model")
@click.option("--suite", type=click.Choice(SUITES), help="What to measure; default: the recipe's wishes, or quick.")
@click.option("--recipe", "recipe_name", metavar="RECIPE", help="Takes probes, texts and teacher from a recipe.")
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key, such as evaluate.recall.samples."
)
@click.option("--text", "texts", multiple=True, metavar="PATH", help="Held-out text (repeat); instead of the recipe's.")
@click.option("--against", "teacher", metavar="MODEL", help="The teacher; default: the one the hybrid was made from.")
@click.option("--alone", is_flag=True, help="Measure the model without a teacher.")
@click.option("--probe", "probes", multiple=True, type=click.Choice(PROBES), help="Only this probe (repeat).")
@click.option("--reading", multiple=True, metavar="FILE", help="Questions on documents: JSON lines or SQuAD (repeat).")
@click.option("--choices", multiple=True, metavar="FILE", help="Multiple choice: JSON lines or BIG-bench (repeat).")
@click.option("--harness", metavar="TASK,...", help="Tasks of lm-eval, which the extra `harness` installs.")
@click.option("--gate", "gates", multiple=True, metavar="CONDITION", help="Exit 7 unless it holds (repeat).")
@click.option("--seed", type=int, help="Seed of all that is drawn; default: the recipe's, or 0.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write results.json here.")
@click.option("--overwrite", is_flag=True, help="Replace the file given with --out.")
def command(
    settings: Settings,
    model: str,
    suite: str | None,
    recipe_name: str | None,
    changes: tuple[str, ...],
    texts: tuple[str, ...],
    teacher: str | None,
    alone: bool,
    probes: tuple[str, ...],
    reading: tuple[str, ...],
    choices: tuple[str, ...],
    harness: str | None,
    gates: tuple[str, ...],
    seed: int | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Measure a model against its teacher.

    Perplexity, recall, reading, agreement, what each mixer does, state bytes and speed: what is kept, and what is lost.
    """
    from hybridize.cli.results_view import results_parts
    from hybridize.errors import UsageError
    from hybridize.evaluation.gates import gate, parse_conditions
    from hybridize.recipe.lock import recipe_sha256
    from hybridize.recipe.sources import TextSource

    if out is not None and out.exists() and not overwrite:
        raise UsageError("the file is there already.", where=str(out), hint="Choose another --out, or --overwrite.")
    parse_conditions(gates)
    recipe = read_recipe(recipe_name, changes, None, None) if recipe_name else None
    wishes = Wishes(suite, changes, probes, reading, choices, harness).settings(recipe)
    held_out: Any = tuple(TextSource(path) for path in texts) or (recipe.data if recipe else None)
    base = Path() if texts or recipe is None or recipe.origin is None else recipe.origin.base
    if held_out is None:
        held_out, base = _shipped_texts()
        settings.output.note(f"Measured on the texts that come with hybridize ({TEXTS}); --text names others.")
    from hybridize.evaluation.runner import evaluate

    results = evaluate(
        model,
        teacher=None if alone else teacher or _teacher_of(model) or (recipe.model if recipe else None),
        recipe_evaluate=wishes,
        held_out=held_out,
        base=base,
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


def _shipped_texts() -> tuple[tuple[Any, ...], Path]:
    from hybridize.cli.shipped import shipped_folder
    from hybridize.errors import UsageError
    from hybridize.recipe.sources import TextSource

    folder = shipped_folder()
    if folder is None:
        raise UsageError("nothing says which texts to measure on.", hint="Give --recipe or --text.")
    return (TextSource(TEXTS),), folder
