"""Reads recipes: strict YAML in, a `Recipe` out, every fault of the file at once with file and line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridize.errors import RecipeError
from hybridize.recipe.build import Builder, join, raise_problems
from hybridize.recipe.nodes import Node, node_of, parse, read_text
from hybridize.recipe.overrides import apply_overrides
from hybridize.recipe.probes import Evaluate
from hybridize.recipe.schema import LayerPlan, MixerChoice, Origin, Recipe
from hybridize.recipe.sources import TextSource
from hybridize.recipe.suites import with_suite

ConfigOf = Callable[[str], type]
"""Gives a mixer's configuration class by name, or raises RecipeError: `hybridize.mixers.registry.config_class`."""


def load_recipe(path: str | Path, *, overrides: Sequence[str] = (), mixer_configs: ConfigOf | None = None) -> Recipe:
    """Reads a recipe file.

    Args:
        path: the YAML file.
        overrides: `KEY=VALUE` texts, applied in order: dotted keys, list positions as numbers, values in YAML.
        mixer_configs: checks the options of mixers; None leaves that to `plan`.

    Raises:
        RecipeError: the file cannot be read or something in it is wrong; `problems` lists every fault.
    """
    path = Path(path)
    root = parse(read_text(path), str(path))
    if root is None:
        raise RecipeError("is empty.", where=str(path), hint="`hybridize recipes copy` gives one to start from.")
    if isinstance(root.value, dict):  # else the file is what to complain about, not what would change in it
        apply_overrides(root, overrides)
    return _recipe(root, Origin(path=path, overrides=tuple(overrides)), mixer_configs)


def load_evaluate(suite: str | None, *, overrides: Sequence[str] = ()) -> Evaluate:
    """The settings of an evaluation without a recipe.

    Args:
        suite: a name from `hybridize.recipe.suites`; None: the defaults.
        overrides: as in `load_recipe`; their keys begin with `evaluate.`.

    Raises:
        RecipeError: no such suite, or something in the overrides is wrong.
    """
    root = node_of({"evaluate": {} if suite is None else {"suite": suite}}, "--suite")
    apply_overrides(root, overrides)
    assert isinstance(root.value, dict)
    others = [key for key in root.value if key != "evaluate"]
    if others:
        where = root.value[others[0]].where
        hint = "Its keys begin with `evaluate.`; others need --recipe."
        raise RecipeError(f"{others[0]} is no part of an evaluation.", where=where, hint=hint)
    builder = Builder(_SHORTHANDS)
    settings: Evaluate = builder.build(Evaluate, root.value["evaluate"], "evaluate")
    raise_problems(builder.problems, where="--set")
    return settings


def recipe_from_dict(
    values: Mapping[str, Any], *, where: str | Path = "recipe", mixer_configs: ConfigOf | None = None
) -> Recipe:
    """The inverse of `recipe_to_dict`; also reads what `load_recipe` would, as plain Python data.

    Raises:
        RecipeError: as in `load_recipe`, with `where` in place of file and line.
    """
    return _recipe(node_of(values, str(where)), Origin(path=Path(where)), mixer_configs)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe, defaults included, as plain data (the form of the lock file)."""
    values: dict[str, Any] = _plain(recipe)
    return values


def build_config(cls: type, options: Mapping[str, Any], *, where: str, key: str) -> Any:
    """An instance of a mixer's configuration class from its recipe keys.

    Raises:
        RecipeError: unknown keys, wrong types, values out of range; all of them, at `where`.
    """
    builder = Builder()
    made = builder.dataclass(cls, node_of(options, where), key)
    raise_problems(builder.problems, where=where)
    return made


def _recipe(root: Node, origin: Origin, mixer_configs: ConfigOf | None) -> Recipe:
    def choice(builder: Builder, node: Node, key: str) -> Any:
        return _mixer_choice(builder, node, key, mixer_configs)

    builder = Builder(_SHORTHANDS, {MixerChoice: choice})
    recipe: Recipe = builder.build(Recipe, root, "")
    raise_problems(builder.problems, where=str(origin.path))
    return dataclasses.replace(recipe, origin=dataclasses.replace(origin, lines=builder.lines))


def _layer_plan(node: Node) -> Node:
    """`layers: "G T"` is a pattern, a list of names too, a list of groups is rules."""
    if isinstance(node.value, str):
        return Node({"pattern": node}, node.where)
    if isinstance(node.value, list) and node.value:
        if all(isinstance(item.value, str) for item in node.value):
            return Node({"pattern": Node(" ".join(str(item.value) for item in node.value), node.where)}, node.where)
        return Node({"rules": node}, node.where)
    if isinstance(node.value, dict) and isinstance(getattr(node.value.get("pattern"), "value", None), list):
        names = node.value["pattern"]
        if all(isinstance(item.value, str) for item in names.value):  # type: ignore[union-attr]
            text = " ".join(str(item.value) for item in names.value)  # type: ignore[union-attr]
            return Node({**node.value, "pattern": Node(text, names.where, text)}, node.where)
    return node


def _text_source(node: Node) -> Node:
    """A text alone is the path."""
    return Node({"path": node}, node.where) if isinstance(node.value, str) else node


_SHORTHANDS = {LayerPlan: _layer_plan, TextSource: _text_source, Evaluate: with_suite}


def _mixer_choice(builder: Builder, node: Node, key: str, mixer_configs: ConfigOf | None) -> Any:
    """`{mixer: NAME, option: value, ...}`, or NAME alone for the default options."""
    if isinstance(node.value, str):
        node = Node({"mixer": node}, node.where)
    if not isinstance(node.value, dict) or "mixer" not in node.value:
        return builder.complain(node, key, "expected `mixer: NAME` and that mixer's options.")
    name = builder.build(str, node.value["mixer"], join(key, "mixer"))
    if builder.is_bad(name):
        return name
    for option, child in node.value.items():
        builder.lines.setdefault(join(key, option), child.where)
    given = {option: child.plain() for option, child in node.value.items() if option != "mixer"}
    if mixer_configs is None:
        return MixerChoice(name, given)
    try:
        cls = mixer_configs(name)
    except RecipeError as error:
        return builder.complain(node.value["mixer"], join(key, "mixer"), f"{error.what} {error.hint}")
    config = builder.dataclass(cls, node, key, skip=("mixer",))
    if builder.is_bad(config):
        return config
    return MixerChoice(name, {option: getattr(config, option) for option in given if hasattr(config, option)})


def _plain(value: Any) -> Any:
    if isinstance(value, MixerChoice):
        return {"mixer": value.mixer, **{key: _plain(item) for key, item in value.options.items()}}
    if isinstance(value, LayerPlan):
        return _plain_layers(value)
    if dataclasses.is_dataclass(value):
        fields = (field for field in dataclasses.fields(value) if field.metadata.get("in_file", True))
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _plain_layers(layers: LayerPlan) -> dict[str, Any]:
    rules = [{key: _plain(item) for key, item in dataclasses.asdict(rule).items()} for rule in layers.rules]
    return {"pattern": layers.pattern, "rules": rules, "allow_no_full_attention": layers.allow_no_full_attention}
