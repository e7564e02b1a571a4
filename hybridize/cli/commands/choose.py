"""hybridize choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import dtype_option, read_recipe, recipe_argument


@make(
    name="choose",
    examples=(
        "hybridize choose recipe.yaml",
        "hybridize choose recipe.yaml --count 8 --text corpus/held-out/facts.jsonl --out choice.json",
        "hybridize choose recipe.yaml --sequences 4 --sequence-tokens 512 --window 64   (quick, without a GPU)",
    ),
)
@recipe_argument
@click.option("--count", type=int, help="Layers that keep full attention; default: as many as in the recipe.")
@click.option("--text", "texts", multiple=True, metavar="[NAME:]PATH", help="Text (repeat); default: the recipe's.")
@click.option(
    "--sequences", type=click.IntRange(1), default=12, show_default=True, help="Texts that each choice is tried on."
)
@click.option(
    "--sequence-tokens",
    type=click.IntRange(2),
    default=4096,
    show_default=True,
    help="Their length; each is of one document.",
)
@click.option(
    "--window",
    "window_tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Tokens that the other layers see meanwhile.",
)
@click.option(
    "--sinks",
    "sink_tokens",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="First tokens that they see too.",
)
@dtype_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write all numbers here, as JSON.")
@click.option("--overwrite", is_flag=True, help="Replace the file given with --out.")
def command(
    settings: Settings,
    recipe_name: str,
    changes: tuple[str, ...],
    model: str | None,
    seed: int | None,
    texts: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Find the layers that should keep full attention.

    All layers of the teacher get a sliding window. Then full attention returns layer by layer, each time to the one
    that brings the predictions closest to the teacher's own. Nothing is trained; use text whose answers lie far back.
    """
    from hybridize.cli.choice_view import choice_parts
    from hybridize.corpus.ingredients import parse_source
    from hybridize.errors import UsageError

    if out is not None and out.exists() and not overwrite:
        raise UsageError("the file is there already.", where=str(out), hint="Choose another --out, or --overwrite.")
    if out is not None and not out.absolute().parent.is_dir():
        hint = "Make it, or choose another --out."
        raise UsageError("there is no such folder.", where=str(out.absolute().parent), hint=hint)
    recipe = read_recipe(recipe_name, changes, model, seed)
    from hybridize.distillation.layer_choice.run import ChoiceOptions, choose_layers

    values = choose_layers(
        recipe,
        ChoiceOptions(**options),
        base=recipe.origin.base if recipe.origin else None,
        texts=tuple(map(parse_source, texts)),
        offline=settings.offline,
        reporter=settings.output.reporter(),
    )
    if len(values["other_mixers"]) > 1:
        names = ", ".join(values["other_mixers"])
        settings.output.warning(f"The recipe uses {names}; the lines give {values['other_mixers'][0]} to all others.")
    parts = choice_parts(values)
    if out is not None:
        from hybridize.files import write_whole

        text = json.dumps({"schema": "hybridize/choose/1", **values}, indent=2, ensure_ascii=False)
        write_whole(out, text + "\n")
        parts += ["", f"written to {out}"]
    settings.output.result("choose", values, parts)
