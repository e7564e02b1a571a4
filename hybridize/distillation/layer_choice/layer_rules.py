"""A choice of layers as lines of a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hybridize.mixers.registry import MIXERS
from hybridize.recipe.layers import FULL, choose_mixers
from hybridize.recipe.schema import Recipe


@dataclass(frozen=True)
class OtherMixers:
    """What a recipe does with its layers.

    Attributes:
        full: layers that keep full attention.
        uses: what `use:` says for the others, the most frequent first.
    """

    full: tuple[int, ...]
    uses: tuple[str, ...]

    def lines(self, chosen: Collection[int], num_layers: int) -> dict[str, Any]:
        """The two lists of layers, and the rules for a recipe in which all but the chosen get `uses[0]`."""
        full = sorted(chosen)
        others = [index for index in range(num_layers) if index not in chosen]
        rules = [
            "layers:",
            f"  - {{use: {FULL}, indices: {full}}}",
            f"  - {{use: {self.uses[0]}, indices: {others}}}",
        ]
        return {"full_attention": full, "others": others, "other_mixers": list(self.uses), "recipe_lines": rules}


def other_mixers(recipe: Recipe, num_layers: int) -> OtherMixers:
    """Reads the recipe's layers.

    Raises:
        RecipeError: they do not fit the model.
    """
    choices = choose_mixers(recipe, num_layers, tuple(MIXERS))
    names = [
        key.removeprefix("mixers.") if key.startswith("mixers.") else choice.mixer
        for key, choice in choices
        if choice.mixer != FULL
    ]
    full = tuple(index for index, (_, choice) in enumerate(choices) if choice.mixer == FULL)
    return OtherMixers(full, tuple(name for name, _ in Counter(names).most_common()))
