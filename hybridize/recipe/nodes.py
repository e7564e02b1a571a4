"""YAML text to a tree in which every value knows its file and line.

Only plain data is accepted: tags other than YAML's own scalars, anchors, repeated keys, several documents and
files over 1 MB are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hybridize.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
_PREFIX = "tag:yaml.org,2002:"
_SCALARS = {_PREFIX + kind: kind for kind in ("null", "bool", "int", "float", "str", "timestamp", "merge", "value")}
# YAML 1.1 reads 1e-4 as text, because it wants a dot and a signed exponent; nobody who writes it means text.
_SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")

Scalar = None | bool | int | float | str


@dataclass
class Node:
    """One value of the file.

    Attributes:
        value: a scalar, a list of nodes, or a dictionary of nodes by key.
        where: "file:line", or the override it comes from.
        text: a scalar as it was written.
    """

    value: Scalar | list[Node] | dict[str, Node]
    where: str
    text: str = ""

    def plain(self) -> Any:
        """The value without places: lists become tuples, as in frozen dataclasses."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return tuple(node.plain() for node in self.value)
        return self.value

    def describe(self) -> str:
        """The value in words, for messages."""
        if isinstance(self.value, dict):
            return "a group of keys"
        if isinstance(self.value, list):
            return "a list"
        if self.value is None:
            return "nothing"
        kinds = {bool: "the truth value", int: "the whole number", float: "the number", str: "the text"}
        shown = repr(self.value) if isinstance(self.value, str) else self.text or str(self.value)
        return f"{kinds[type(self.value)]} {shown[:80]}"


def node_of(value: Any, where: str) -> Node:
    """A tree from plain Python data, all of it placed at `where`."""
    if isinstance(value, Mapping):
        return Node({str(key): node_of(item, where) for key, item in value.items()}, where)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return Node([node_of(item, where) for item in value], where)
    if value is None or isinstance(value, bool | int | float | str):
        return Node(value, where, "" if value is None else str(value))
    raise RecipeError(f"a value of type {type(value).__name__} cannot be part of a recipe.", where=where)


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        RecipeError: no such file, over 1 MB, or not UTF-8.
    """
    try:
        if not path.is_file():
            raise RecipeError(
                "there is no such recipe.", where=str(path), hint="`hybridize recipes ls` lists those that are shipped."
            )
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read ({error}).", where=str(path), hint="Check name and permissions.") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(
            f"is larger than {MAX_BYTES:,} bytes.", where=str(path), hint="Is this a recipe? They are small."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError("is not UTF-8 text.", where=f"{path}:{line}", hint="Save the file as UTF-8.") from error


class _Loader(yaml.SafeLoader):
    """Composes nodes; refuses anchors (a few lines of them can grow into gigabytes) and endless nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (& and *) are not read in recipes", problem_mark=event.start_mark
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="is nested too deeply", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse(text: str, name: str, *, place: str | None = None) -> Node | None:
    """The tree of a YAML text; None if it holds no value at all.

    Args:
        text: the YAML.
        name: file name for "name:line".
        place: where every value is said to be, instead of file and line (overrides).

    Raises:
        RecipeError: not YAML, or not plain data; with the line.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return None if root is None else _convert(root, loader, name, place)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place or (f"{name}:{mark.line + 1}" if mark else name)
        problem = (error.problem or str(error)).strip()
        hint = "Check indentation, colons and quotes."
        if "\\t" in problem:
            problem, hint = "a tab stands where only spaces may", "Indent with spaces."
        raise RecipeError(f"is not valid YAML: {problem}.", where=where, hint=hint) from error
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        raise RecipeError(
            f"is not valid YAML: {problem}.", where=place or name, hint="Save it as plain text."
        ) from error
    except RecursionError as error:
        raise RecipeError("is nested too deeply.", where=place or name, hint="Recipes are flat.") from error


def _convert(node: yaml.Node, loader: _Loader, name: str, place: str | None) -> Node:
    where = place or f"{name}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
        found: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = place or f"{name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _SCALARS:
                raise RecipeError("a key is not plain text.", where=line, hint="Write `key: value`.")
            if key_node.value in found:
                raise RecipeError(
                    f"the key {key_node.value!r} is there twice (first at {found[key_node.value].where}).",
                    where=line,
                    hint="Keep one of the two.",
                )
            value = _convert(value_node, loader, name, place)
            # A group is placed where its key stands, which is what the reader of a message looks for.
            value.where = line if isinstance(value.value, dict | list) else value.where
            found[key_node.value] = value
        return Node(found, where)
    if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
        return Node([_convert(item, loader, name, place) for item in node.value], where)
    kind = _SCALARS.get(node.tag)
    if not isinstance(node, yaml.ScalarNode) or kind is None:
        raise RecipeError(
            f"the tag {node.tag.replace(_PREFIX, '!!')!r} is not allowed: recipes hold plain data and never run code.",
            where=where,
            hint="Remove the tag.",
        )
    return Node(_scalar(node, kind, loader, where), where, node.value)


def _scalar(node: yaml.ScalarNode, kind: str, loader: _Loader, where: str) -> Scalar:
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return bool(loader.construct_yaml_bool(node))
        if kind == "int":
            return int(loader.construct_yaml_int(node))
        if kind == "float":
            return float(loader.construct_yaml_float(node))
    except (ValueError, KeyError, OverflowError) as error:
        raise RecipeError(
            f"{node.value[:40]!r} cannot be read as {kind}.", where=where, hint="Write it out."
        ) from error
    text = str(node.value)
    if node.style is None and _SCIENTIFIC.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text
