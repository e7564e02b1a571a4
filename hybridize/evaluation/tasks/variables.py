"""RULER's variable tracking: a chain of assignments through noise, and every variable at its end."""

from __future__ import annotations

import random
import string
from itertools import pairwise, repeat

from hybridize.evaluation.items import Item
from hybridize.evaluation.tasks.haystack import fill
from hybridize.evaluation.tasks.needles import NOISE, NUMBER_TOKENS
from hybridize.evaluation.tasks.pieces import Pieces
from hybridize.evaluation.tasks.question import Asked

NUM_HOPS = 4
HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
QUESTION = (
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are:"
)
EXAMPLE_LETTERS, LETTERS = 3, 5
_EXAMPLE_NOISE = 5
_JOINING_TOKENS = 2


def variable_tracking(pieces: Pieces, asked: Asked) -> Item:
    """One chain of five variables, behind a solved example with shorter names, as RULER gives one."""
    rng = asked.rng
    names = _names(LETTERS, rng)
    value = str(rng.randint(10_000, 99_999))
    head = pieces.opening(f"{_example(rng)}\n\n{HEAD}\n")
    tail = pieces.joined(QUESTION.format(value=value, count=len(names)))
    depths = sorted(rng.random() for _ in names)
    context = fill(
        pieces,
        asked.tokens - len(pieces.start) - len(head) - len(tail),
        repeat(NOISE),
        [*zip(depths, _statements(names, value), strict=True)],
        lines=True,
    )
    if context is None:
        raise asked.no_room()
    before = len(pieces.start) + len(head)
    return Item(
        asked.task,
        (*pieces.start, *head, *context.ids, *tail),
        tuple(names),
        NUMBER_TOKENS + sum(len(pieces.spaced(name)) + _JOINING_TOKENS for name in names),
        asked.tokens,
        evidence=tuple((before + start, before + end) for start, end in context.spans),
    )


def _names(letters: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) <= NUM_HOPS:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(found)


def _statements(names: list[str], value: str) -> list[str]:
    first = [f"VAR {names[0]} = {value}"]
    return first + [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]


def _example(rng: random.Random) -> str:
    """A whole question with its answer, in a few lines of noise."""
    names, value = _names(EXAMPLE_LETTERS, rng), str(rng.randint(10_000, 99_999))
    lines = [NOISE] * _EXAMPLE_NOISE
    places = sorted(rng.sample(range(len(lines) + 1), len(names)), reverse=True)
    for place, statement in zip(places, reversed(_statements(names, value)), strict=True):
        lines.insert(place, statement)
    question = QUESTION.format(value=value, count=len(names))
    return "\n".join((HEAD, *lines, question)) + " " + " ".join(names)
