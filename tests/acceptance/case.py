"""A fault and what must come of it."""

from __future__ import annotations

from typing import NamedTuple

from tests.acceptance.project import Break

TEACHER = ("convert", "{in}/recipe.yaml", "--model", "{in}/teacher", "--out", "{out}")
SHARDED = ("convert", "{in}/recipe.yaml", "--model", "{in}/sharded", "--out", "{out}")
RUN = ("run", "{in}/recipe.yaml", "--model", "{in}/teacher", "--out", "{out}")


class Case(NamedTuple):
    """A fault and what must come of it."""

    id: str
    breaks: Break
    command: tuple[str, ...]
    code: int
    says: tuple[str, ...]
