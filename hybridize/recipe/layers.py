"""Which layer gets which mixer: a recipe's pattern or rules against the depth of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from hybridize.recipe.build import raise_problems, suggest
from hybridize.recipe.schema import LayerRule, MixerChoice, Recipe

LETTERS: Mapping[str, str] = {
    "G": "gated_delta_net",
    "T": "token_eviction",
    "S": "sliding_window",
    "N": "native_sparse_attention",
    "F": "full_attention",
}
FULL = "full_attention"
_RANGE = re.compile(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*")

Where = Callable[[str], str]


def choose_mixers(recipe: Recipe, num_layers: int, known: Collection[str]) -> tuple[tuple[str, MixerChoice], ...]:
    """The name used and its mixer for every layer.

    Args:
        recipe: gives `layers` and `mixers`.
        num_layers: depth of the model.
        known: names of all mixers.

    Returns:
        For each layer (key, choice): the recipe key that holds the options ("mixers.T", or "layers" for a mixer
        used with its defaults), and the mixer.

    Raises:
        RecipeError: unknown names, layers outside the model or assigned twice, nothing converted, or no full attention
            left without the opt-in; all that apply at once.
    """
    where: Where = recipe.origin.where if recipe.origin else lambda key: "recipe"
    problems: list[str] = []
    if recipe.layers.pattern is not None:
        uses = _from_pattern(recipe.layers.pattern, num_layers, where, problems)
    else:
        uses = _from_rules(recipe.layers.rules, num_layers, where, problems)
    choices: list[tuple[str, MixerChoice]] = []
    complained: set[str] = set()
    for key, use in uses:
        choice = _look_up(use, recipe.mixers, known)
        if choice is None and use not in complained:
            complained.add(use)
            names = [*recipe.mixers, *known]
            listed = f" Known mixers: {', '.join(known)}; letters: {', '.join(LETTERS)}."
            guess = suggest(use, names).split("; known")[0]
            problems.append(f"{where(key)}: {key}: unknown mixer {use!r}{guess or '.'}{listed}")
        choices.append(choice or ("layers", MixerChoice(FULL)))
    if not problems:
        problems += _whole_plan_problems(recipe, choices, where)
    raise_problems(problems, where=where("layers"))
    return tuple(choices)


def _look_up(use: str, mixers: Mapping[str, MixerChoice], known: Collection[str]) -> tuple[str, MixerChoice] | None:
    if use in mixers:
        return f"mixers.{use}", mixers[use]
    name = LETTERS.get(use, use)
    return ("layers", MixerChoice(name)) if name in known else None


def _from_pattern(pattern: str, num_layers: int, where: Where, problems: list[str]) -> list[tuple[str, str]]:
    names = pattern.replace(",", " ").split()
    if not names:
        problems.append(f"{where('layers.pattern')}: layers.pattern: is empty. Write names or letters: G T G F.")
        return []
    if len(names) > num_layers:
        problems.append(
            f"{where('layers.pattern')}: layers.pattern: names {len(names)} layers and the model has {num_layers}."
        )
        return []
    return [("layers.pattern", names[index % len(names)]) for index in range(num_layers)]


def _from_rules(
    rules: tuple[LayerRule, ...], num_layers: int, where: Where, problems: list[str]
) -> list[tuple[str, str]]:
    uses: list[tuple[str, str] | None] = [None] * num_layers
    for number, rule in enumerate(rules):
        key = f"layers.rules.{number}"
        indices = _rule_indices(rule, key, num_layers, where, problems)
        outside = sorted({index for index in indices if not 0 <= index < num_layers})
        if outside:
            advice = f'Use "every: 4" or list layers 0..{num_layers - 1}.'
            found = f"{', '.join(map(str, outside[:8]))}{' ...' if len(outside) > 8 else ''}"
            verb = "is" if len(outside) == 1 else "are"
            model = f"model has {num_layers} layers"
            problems.append(f"{where(key)}: {key}: {found} {verb} outside 0..{num_layers - 1} ({model}). {advice}")
        for index in indices:
            if not 0 <= index < num_layers:
                continue
            taken = uses[index]
            if taken is not None:
                problems.append(f"{where(key)}: {key}: layer {index} is assigned twice (first by {taken[0]}).")
            else:
                uses[index] = (key, rule.use)
    return [use or ("layers", FULL) for use in uses]


def _rule_indices(rule: LayerRule, key: str, num_layers: int, where: Where, problems: list[str]) -> list[int]:
    if rule.indices is not None:
        if not rule.indices:
            problems.append(f"{where(key)}: {key}.indices: names no layer.")
        return list(rule.indices)
    if rule.every is not None:
        return list(range(rule.offset, num_layers, rule.every))
    bounds = _RANGE.fullmatch(rule.range or "")
    if not bounds or int(bounds[1]) > int(bounds[2]):
        example = 'Write "first-last", both included: "4-11".'
        problems.append(f"{where(key)}: {key}.range: {rule.range!r} is not a range of layers. {example}")
        return []
    # Only what is needed to name a layer outside: the numbers may be large.
    return list(range(int(bounds[1]), min(int(bounds[2]), num_layers + 8) + 1)) or [int(bounds[1])]


def _whole_plan_problems(recipe: Recipe, choices: list[tuple[str, MixerChoice]], where: Where) -> list[str]:
    kept = sum(choice.mixer == FULL for _, choice in choices)
    if kept == len(choices):
        return [f"{where('layers')}: layers: no layer is converted; give at least one a mixer other than {FULL}."]
    if kept == 0 and not recipe.layers.allow_no_full_attention:
        return [
            f"{where('layers')}: layers: no layer keeps full attention, so nothing can look at every past token. "
            "Keep some with F, or say that you want this: layers.allow_no_full_attention: true."
        ]
    return []
