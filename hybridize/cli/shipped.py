"""The recipes that come with hybridize."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hybridize.errors import RecipeError, UsageError
from hybridize.files import write_whole


def shipped_folder() -> Path | None:
    """The folder of shipped recipes: beside the package in the source tree, else where a wheel puts its data."""
    source_tree = Path(__file__).resolve().parents[2]
    for folder in (source_tree / "recipes", Path(sys.prefix) / "share" / "hybridize" / "recipes"):
        if folder.is_dir():
            return folder
    return None


def shipped_recipes() -> dict[str, Path]:
    """Recipe files by name, sorted."""
    folder = shipped_folder()
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_recipe(name: str) -> Path:
    """The path of a recipe given as a file or by the name of a shipped one.

    Raises:
        RecipeError: neither; suggests the nearest name.
    """
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml") or "/" in name:
        return path
    recipes = shipped_recipes()
    if name in recipes:
        return recipes[name]
    import difflib

    near = difflib.get_close_matches(name, recipes, 1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    raise RecipeError(
        "there is no file and no shipped recipe of this name.",
        where=name,
        hint=f"{guess}`hybridize recipes ls` lists those that are shipped.",
    )


def copy_recipe(recipe: Path, to: Path, *, overwrite: bool = False) -> Path:
    """Copies a recipe; text files it names relative to itself get their whole path, so that the copy still finds them.

    Raises:
        UsageError: the file is there already.
    """
    if to.is_dir():
        to = to / recipe.name
    if to.exists() and not overwrite:
        raise UsageError("the file is there already.", where=str(to), hint="Name another one, or pass --overwrite.")
    text = recipe.read_text(encoding="utf-8")
    texts = recipe.resolve().parent / "text"
    # Recipes of ours name their texts as text/..., and nothing else in them begins so.
    text = re.sub(r"(?<![\w/.-])text/(?=[\w*])", lambda _: f"{texts}/", text)
    to.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(to, text)


def opening_comment(path: Path) -> list[str]:
    """The lines of the comment that a recipe opens with, without the marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines
