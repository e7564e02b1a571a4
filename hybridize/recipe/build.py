"""Frozen dataclasses from a tree of nodes, driven by their type hints; every fault is collected, with its place."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hybridize.errors import RecipeError
from hybridize.recipe.nodes import Node

T = TypeVar("T")
Shorthand = Callable[[Node], Node]

_BAD: Any = object()
"""Stands for a value that has been complained about."""
CHECK_HINT = "Correct the recipe; `hybridize plan` checks it within seconds."
_MAX_INT = 2**63
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Builder:
    """Builds values and remembers what was wrong.

    Args:
        shorthands: by dataclass, what turns a short form into the full one.
        special: by dataclass, what builds it instead of the general rule.

    Attributes:
        problems: "place: key: message" lines.
        lines: place by dotted key.
    """

    def __init__(
        self,
        shorthands: Mapping[type, Shorthand] | None = None,
        special: Mapping[type, Callable[[Builder, Node, str], Any]] | None = None,
    ) -> None:
        self.shorthands = shorthands or {}
        self.special = special or {}
        self.problems: list[str] = []
        self.lines: dict[str, str] = {}

    def complain(self, node: Node, key: str, message: str) -> Any:
        """Notes a problem; returns the mark of a bad value."""
        self.problems.append(f"{node.where}: {key}: {message}" if key else f"{node.where}: {message}")
        return _BAD

    def is_bad(self, value: object) -> bool:
        """Whether `value` stands for something already complained about."""
        return value is _BAD

    def build(self, hint: Any, node: Node, key: str) -> Any:
        """The value of type `hint` that `node` writes, or the bad mark."""
        self.lines.setdefault(key, node.where)
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return node.plain()
        if origin in (Union, types.UnionType):
            return self._union(arguments, node, key)
        if origin is Literal:
            return self._literal(arguments, node, key)
        if origin is tuple:
            return self._tuple(arguments, node, key)
        if origin is not None and issubclass(origin, Mapping):
            return self._mapping(arguments[1], node, key)
        if hint in self.special:
            return self.special[hint](self, node, key)
        if dataclasses.is_dataclass(hint):
            shorthand = self.shorthands.get(hint)  # type: ignore[arg-type]
            return self.dataclass(hint, shorthand(node) if shorthand else node, key)
        return self._scalar(hint, node, key)

    def dataclass(self, cls: Any, node: Node, key: str, *, skip: Iterable[str] = ()) -> Any:
        """An instance of the dataclass `cls` from a mapping; keys in `skip` belong to somebody else."""
        if not isinstance(node.value, dict):
            expected = ", ".join(_file_fields(cls))
            return self.complain(node, key, f"expected a group of keys ({expected}), found {node.describe()}.")
        fields, hints = _file_fields(cls), get_type_hints(cls)
        values: dict[str, Any] = {}
        bad = False
        for name, child in node.value.items():
            if name in skip:
                continue
            if name not in fields:
                self.complain(child, join(key, name), "unknown key" + suggest(name, fields))
                continue
            value = self.build(hints[name], child, join(key, name))
            if value is _BAD:
                bad = True
            else:
                values[name] = value
        for name in (name for name, field in fields.items() if _required(field) and name not in node.value):
            self.complain(node, key, f"the key {name!r} is missing.")
            bad = True
        made = self._construct(cls, values, node, key)
        return _BAD if bad else made

    def _construct(self, cls: Any, values: dict[str, Any], node: Node, key: str) -> Any:
        """Constructs `cls`; when a range check names a key, notes it, leaves the key out and looks for the next."""
        fields = _file_fields(cls)
        bad = False
        while not any(_required(field) and name not in values for name, field in fields.items()):
            try:
                made = cls(**values)
            except RecipeError as error:
                bad = True
                name = error.where.rpartition(".")[2]
                children = node.value if isinstance(node.value, dict) else {}
                child = children.get(name, node)
                self.complain(child, join(key, name) if name in fields else key, _sentence(error))
                if values.pop(name, _BAD) is _BAD:
                    return _BAD
            else:
                return _BAD if bad else made
        return _BAD

    def _union(self, arguments: tuple[Any, ...], node: Node, key: str) -> Any:
        others = [argument for argument in arguments if argument is not type(None)]
        if node.value is None and len(others) < len(arguments):
            return None
        if len(others) == 1:
            return self.build(others[0], node, key)
        for other in others:
            trial = Builder(self.shorthands, self.special)
            value = trial.build(other, node, key)
            if value is not _BAD and not trial.problems:
                self.lines.update(trial.lines)
                return value
        expected = " or ".join(_WORDS.get(other, getattr(other, "__name__", str(other))) for other in others)
        return self.complain(node, key, f"expected {expected}, found {node.describe()}.")

    def _literal(self, choices: tuple[Any, ...], node: Node, key: str) -> Any:
        for choice in choices:
            if node.value == choice and type(node.value) is type(choice):
                return choice
        names = [str(choice) for choice in choices]
        near = difflib.get_close_matches(str(node.value), names, 1)
        question = f" Did you mean {near[0]!r}?" if near else ""
        return self.complain(node, key, f"must be one of {', '.join(names)}, found {node.describe()}.{question}")

    def _tuple(self, arguments: tuple[Any, ...], node: Node, key: str) -> Any:
        if not isinstance(node.value, list):
            return self.complain(node, key, f"expected a list, found {node.describe()}.")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            hints = (arguments[0],) * len(node.value)
        elif len(arguments) == len(node.value):
            hints = arguments
        else:
            return self.complain(node, key, f"expected {len(arguments)} values, found {len(node.value)}.")
        pairs = zip(hints, node.value, strict=True)
        values = [self.build(hint, item, join(key, str(index))) for index, (hint, item) in enumerate(pairs)]
        return _BAD if any(value is _BAD for value in values) else tuple(values)

    def _mapping(self, hint: Any, node: Node, key: str) -> Any:
        if not isinstance(node.value, dict):
            return self.complain(node, key, f"expected a group of keys, found {node.describe()}.")
        values = {name: self.build(hint, item, join(key, name)) for name, item in node.value.items()}
        return _BAD if any(value is _BAD for value in values.values()) else values

    def _scalar(self, hint: Any, node: Node, key: str) -> Any:
        value = node.value
        if hint is float and type(value) in (int, float):
            try:
                number = float(value)  # type: ignore[arg-type]
            except OverflowError:
                number = math.inf
            return number if math.isfinite(number) else self.complain(node, key, f"{node.text} is not a finite number.")
        if hint is int and type(value) is int and abs(value) >= _MAX_INT:
            return self.complain(node, key, "the number is too large.")
        if hint in _WORDS and type(value) is hint:
            return value
        advice = " Put it in quotes if it is text." if hint is str and isinstance(value, int | float) else ""
        return self.complain(node, key, f"expected {_WORDS.get(hint, hint)}, found {node.describe()}.{advice}")


def join(key: str, name: str) -> str:
    """The dotted key of `name` inside `key`."""
    return f"{key}.{name}" if key else name


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an "unknown ..." message: the nearest known name, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names) or 'none'}."


def _file_fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls) if field.metadata.get("in_file", True)}


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _sentence(error: RecipeError) -> str:
    return f"{error.what} {error.hint}".strip()


def raise_problems(problems: list[str], *, where: str, hint: str = CHECK_HINT) -> None:
    """Raises one RecipeError for all `problems`, each "place: key: what"; nothing if there are none."""
    if not problems:
        return
    if len(problems) == 1:
        place, _, what = problems[0].partition(": ")
        raise RecipeError(what, where=place, hint=hint, problems=tuple(problems))
    listed = "".join(f"\n  {problem}" for problem in problems)
    raise RecipeError(f"{len(problems)} problems:{listed}", where=where, hint=hint, problems=tuple(problems))
