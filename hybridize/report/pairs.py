"""Shares of student and teacher on the same questions, and whether their ratio says anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hybridize.report.numbers import ABSENT, percent, ratio

Pair = Mapping[str, Any]

LEAST_SHARE = 0.1
"""A teacher that answers fewer than this has next to nothing that a student could keep."""


def says_nothing(pair: Pair, chance: float = 0.0) -> str:
    """Why a ratio to the teacher would mean nothing: "" where it means something, or where there is no teacher.

    Args:
        chance: what guessing scores; a teacher whose interval reaches down to it may be guessing.
    """
    teacher = pair["teacher"]
    if teacher is None:
        return ""
    if chance and teacher["low"] <= chance:
        return f"the teacher is at chance ({percent(chance)})"
    return "" if teacher["share"] >= LEAST_SHARE and pair["kept"] is not None else "the teacher finds next to nothing"


def kept(pair: Pair, chance: float = 0.0) -> str:
    """Student over teacher, or why that says nothing."""
    return says_nothing(pair, chance) or ratio(pair["kept"])


def chance_of(choices: Mapping[str, Any]) -> float:
    """What guessing scores on all questions of the choices probe together."""
    rows = choices["tasks"].values()
    questions = sum(row["questions"] for row in rows)
    return sum(row["chance"] * row["questions"] for row in rows) / questions if questions else 0.0


def pooled(cells: Iterable[Mapping[str, Any] | None]) -> float | None:
    """The share over all questions of several cells; None where nothing was asked."""
    asked = [cell for cell in cells if cell is not None]
    questions = sum(cell["samples"] for cell in asked)
    return sum(cell["share"] * cell["samples"] for cell in asked) / questions if questions else None


def by_length(lengths: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """Entries under lengths, the shortest first (keys of JSON are texts)."""
    return [(int(length), lengths[length]) for length in sorted(lengths, key=int)]


def samples_of(pair: Pair) -> str:
    """How many questions a pair stands for."""
    cell = pair["student"] or pair["teacher"]
    return ABSENT if cell is None else f"{cell['samples']:,}"
