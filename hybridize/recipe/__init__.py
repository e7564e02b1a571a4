"""Recipes: what the user wrote. `schema` says what a recipe holds, `reader` reads one, `lock` fixes one for a run."""

from hybridize.recipe.lock import Lock, make_lock, read_lock, recipe_sha256, require_same, write_lock
from hybridize.recipe.reader import load_recipe, recipe_from_dict, recipe_to_dict
from hybridize.recipe.schema import Recipe

__all__ = [
    "Lock",
    "Recipe",
    "load_recipe",
    "make_lock",
    "read_lock",
    "recipe_from_dict",
    "recipe_sha256",
    "recipe_to_dict",
    "require_same",
    "write_lock",
]
