"""hybridize recipes ls | show | copy."""

from __future__ import annotations

from pathlib import Path

import click

from hybridize.cli.app import Command, LazyGroup, Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import _complete_recipe

_EXAMPLES = (
    "hybridize recipes ls",
    "hybridize recipes show smollm2-135m--demo",
    "hybridize recipes copy smollm2-135m--demo mine.yaml",
)


class _Recipes(LazyGroup):
    """A small group whose commands are all here."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self.commands.get(cmd_name)


command = _Recipes(
    "recipes",
    sections={"Commands": ("ls", "show", "copy")},
    package=__name__,
    help="List, show and copy the recipes that come with it.",
    examples=_EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@make(name="ls", examples=_EXAMPLES[:1], cls=Command)
def _list(settings: Settings) -> None:
    """List the shipped recipes."""
    from hybridize.cli.shipped import opening_comment, shipped_recipes

    recipes = shipped_recipes()
    firsts = {name: (opening_comment(path) or [""])[0] for name, path in recipes.items()}
    width = max(map(len, recipes), default=0)
    values = [{"name": name, "path": str(path), "summary": firsts[name]} for name, path in recipes.items()]
    human = [f"{name:<{width}}  {firsts[name]}" for name in recipes]
    settings.output.result("recipes-ls", {"recipes": values}, human)


@make(name="show", examples=_EXAMPLES[1:2], cls=Command)
@click.argument("name", shell_complete=_complete_recipe)
def _show(settings: Settings, name: str) -> None:
    """Print a recipe."""
    from hybridize.cli.shipped import find_recipe
    from hybridize.recipe.nodes import read_text

    path = find_recipe(name)
    text = read_text(path)
    settings.output.result("recipes-show", {"name": path.stem, "path": str(path), "text": text}, [text.rstrip("\n")])


@make(name="copy", examples=_EXAMPLES[2:], cls=Command)
@click.argument("name", shell_complete=_complete_recipe)
@click.argument("to", type=click.Path(path_type=Path), required=False)
@click.option("--overwrite", is_flag=True, help="Replace the file.")
def _copy(settings: Settings, name: str, to: Path | None, overwrite: bool) -> None:
    """Copy a recipe to change it. Its text files are not copied; their paths are kept whole."""
    from hybridize.cli.shipped import copy_recipe, find_recipe

    recipe = find_recipe(name)
    written = copy_recipe(recipe, to or Path(f"{recipe.stem}.yaml"), overwrite=overwrite)
    settings.output.result("recipes-copy", {"path": str(written)}, [str(written)])


for _made in (_list, _show, _copy):
    command.add_command(_made)
