"""`--set distill.stages.0.steps=3`: changes to a recipe from the command line, kept in the lock file."""

from __future__ import annotations

from collections.abc import Sequence

from hybridize.errors import RecipeError
from hybridize.recipe.nodes import Node, parse

_FORM = "Write --set key.in.the.recipe=value; list positions are numbers from 0 (distill.stages.0.steps=3)."


def apply_overrides(root: Node, overrides: Sequence[str]) -> None:
    """Changes the tree `root` in place, one override after the other. Groups of keys on the way are made if absent.

    Raises:
        RecipeError: an override is not KEY=VALUE, its value is not YAML, or its key leads through a plain value.
    """
    for text in overrides:
        key, equals, value_text = text.partition("=")
        place = f"--set {text}"
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError("is not KEY=VALUE.", where=place, hint=_FORM)
        value = parse(value_text, place, place=place) or Node(None, place)
        _put(root, parts, value, place)


def _put(root: Node, parts: list[str], value: Node, place: str) -> None:
    node = root
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if node.value is None:
            node.value, node.where = {}, place
        if isinstance(node.value, dict):
            if last:
                node.value[part] = value
            else:
                node = node.value.setdefault(part, Node({}, place))
        elif isinstance(node.value, list):
            index = _index(part, node, last, ".".join(parts[:position]), place)
            if index == len(node.value):
                node.value.append(Node(None, place))
            if last:
                node.value[index] = value
            else:
                node = node.value[index]
        else:
            so_far = ".".join(parts[:position]) or "the recipe"
            raise RecipeError(f"{so_far} is {node.describe()}, which has no keys.", where=place, hint=_FORM)


def _index(part: str, node: Node, last: bool, so_far: str, place: str) -> int:
    count = len(node.value) if isinstance(node.value, list) else 0
    if not part.isascii() or not part.isdigit() or len(part) > 9 or int(part) > count - (0 if last else 1):
        raise RecipeError(f"{so_far} is a list of {count}; {part!r} is no position in it.", where=place, hint=_FORM)
    return int(part)
