"""Options that several commands have, and what they read from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from hybridize.cli.shipped import find_recipe, shipped_recipes
from hybridize.recipe.schema import Recipe

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = [CompletionItem(name) for name in shipped_recipes() if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


def recipe_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """RECIPE with --set, --model and --seed; the command gets `recipe_name`, `changes`, `model` and `seed`."""
    decorators: tuple[Decorator, ...] = (
        click.argument("recipe_name", metavar="RECIPE", shell_complete=_complete_recipe),
        click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe."),
        click.option("--model", metavar="MODEL", help="Convert this model instead of the recipe's."),
        click.option("--seed", type=int, help="Random seed instead of the recipe's."),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def read_recipe(recipe_name: str, changes: tuple[str, ...], model: str | None, seed: int | None) -> Recipe:
    """The recipe with all that the command line changes in it.

    Raises:
        RecipeError: see `hybridize.recipe.load_recipe`.
    """
    import json

    from hybridize.mixers.registry import config_class
    from hybridize.recipe.reader import load_recipe

    overrides = list(changes)
    if model is not None:
        # As a JSON text, which is YAML too: a name such as "1e5" must stay text.
        overrides.append(f"model={json.dumps(model, ensure_ascii=False)}")
    if seed is not None:
        overrides.append(f"seed={seed}")
    return load_recipe(find_recipe(recipe_name), overrides=overrides, mixer_configs=config_class)


def out_option(help: str) -> Decorator:
    """--out, required."""
    return click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help=help)


overwrite_option: Decorator = click.option("--overwrite", is_flag=True, help="Replace what is in the output folder.")
dry_run_option: Decorator = click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
dtype_option: Decorator = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Arithmetic; auto: bfloat16 where the device computes it natively.",
)


def parse_bytes(text: str) -> int:
    """ "5GB" -> 5000000000; "512MiB" -> 536870912.

    Raises:
        UsageError: not a size.
    """
    import re

    from hybridize.errors import UsageError

    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    size = int(float(match[1]) * units[match[2] or ""]) if match else 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size.", where="--max-shard", hint="Write a size such as 5GB or 512MiB.")
    return size
