"""Suites: the evaluations that come with hybridize, each a file of the keys of `evaluate:`."""

from __future__ import annotations

from pathlib import Path

from hybridize.errors import RecipeError
from hybridize.recipe.nodes import Node, parse, read_text

FOLDER = Path(__file__).parent / "suites"


def suite_names() -> list[str]:
    """The suites that come with hybridize."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def with_suite(node: Node) -> Node:
    """The keys of `evaluate:` on top of those of the suite that it names; without a suite, the keys alone.

    Raises:
        RecipeError: there is no such suite.
    """
    if not isinstance(node.value, dict) or "suite" not in node.value:
        return node
    own = {key: child for key, child in node.value.items() if key != "suite"}
    named = node.value["suite"]
    if named.value not in suite_names():
        known = ", ".join(suite_names())
        raise RecipeError(f"there is no suite {named.value!r}; there are {known}.", where=named.where)
    file = FOLDER / f"{named.value}.yaml"
    base = parse(read_text(file), file.name)
    return _merged(base or Node({}, file.name), Node(own, node.where))


def _merged(below: Node, above: Node) -> Node:
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    keys = [*below.value, *(key for key in above.value if key not in below.value)]
    found: dict[str, Node] = {}
    for key in keys:
        if key in below.value and key in above.value:
            found[key] = _merged(below.value[key], above.value[key])
        else:
            found[key] = above.value[key] if key in above.value else below.value[key]
    return Node(found, above.where)
