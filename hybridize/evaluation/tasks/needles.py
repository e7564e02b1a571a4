"""RULER's needles in haystacks: numbers and UUIDs under keys, in noise, in prose and among their like."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Literal

from hybridize.evaluation.items import Item
from hybridize.evaluation.tasks.haystack import fill
from hybridize.evaluation.tasks.pieces import Ids, Pieces
from hybridize.evaluation.tasks.question import Asked
from hybridize.evaluation.tasks.vocabulary import FIRST, SECOND

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE = "One of the special magic {things} for {key} is: {value}."

ONE = (
    "A special magic {thing} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{thing} afterwards.\n",
    "What is the special magic {thing} for {query} mentioned in the provided text? "
    "The special magic {thing} for {query} mentioned in the provided text is",
)
SEVERAL = (
    "Some special magic {things} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {things} afterwards.\n",
    "What are all the special magic {things} for {query} mentioned in the provided text? "
    "The special magic {things} for {query} mentioned in the provided text are",
)
NUMBER_TOKENS = 10
"""Tokens that an answer of one number may take; more where the tokenizer needs more for it."""
_JOINING_TOKENS = 3
"""Between two answers, a comma, a blank, an "and"; RULER itself leaves 128 tokens for every answer."""


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _words(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)}-{rng.choice(SECOND)}"


@dataclass(frozen=True)
class NeedleTask:
    """One of RULER's tasks.

    Attributes:
        haystack: of repeated noise, of prose, or of needles that nobody asks for.
        thing: what a value is called, in the singular.
        value, key: draw one.
        num_keys: needles' keys. num_values: values of each. num_queries: keys that are asked for.
    """

    haystack: Literal["noise", "prose", "needles"]
    thing: str = "number"
    value: Callable[[random.Random], str] = _number
    key: Callable[[random.Random], str] = _words
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def num_answers(self) -> int:
        """Values that a question asks for."""
        return self.num_queries * self.num_values


NEEDLES = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("prose"),
    "niah_single_3": NeedleTask("prose", "uuid", _uuid),
    "niah_multikey_1": NeedleTask("prose", num_keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", "uuid", _uuid, _uuid),
    "niah_multivalue": NeedleTask("prose", num_values=4),
    "niah_multiquery": NeedleTask("prose", num_keys=4, num_queries=4),
}


@dataclass(frozen=True)
class _Needle:
    key: str
    value: str
    depth: float


def needle(pieces: Pieces, asked: Asked) -> Item:
    """A question of one of the tasks in `NEEDLES`.

    The one needle of a task without others stands at the depth that was asked for, so does the one that is asked for
    among those of other keys; the others, and all where several are asked for, stand anywhere.
    """
    spec, rng = NEEDLES[asked.task], asked.rng
    keys = _distinct(spec.key, spec.num_keys, rng)
    values = _distinct(spec.value, spec.num_keys * spec.num_values, rng)
    has_place = spec.num_answers == 1
    hidden = [
        _Needle(keys[i % spec.num_keys], value, asked.depth if has_place and i == 0 else rng.random())
        for i, value in enumerate(values)
    ]
    queries = keys[: spec.num_queries]
    wanted = [i for i, one in enumerate(hidden) if one.key in queries]
    head, tail = _frame(pieces, spec, queries)
    things = f"{spec.thing}s"
    context = fill(
        pieces,
        asked.tokens - len(pieces.start) - len(head) - len(tail),
        _hay(pieces, spec, rng, set(keys)),
        [(one.depth, SENTENCE.format(things=things, key=one.key, value=one.value)) for one in hidden],
        lines=spec.haystack != "prose",
    )
    if context is None:
        raise asked.no_room()
    before = len(pieces.start) + len(head)
    answers = tuple(hidden[i].value for i in wanted)
    return Item(
        asked.task,
        (*pieces.start, *head, *context.ids, *tail),
        answers,
        answer_tokens(pieces, answers, spec.thing),
        asked.tokens,
        depth=asked.depth if has_place else None,
        evidence=tuple((before + context.spans[i][0], before + context.spans[i][1]) for i in wanted),
    )


def answer_tokens(pieces: Pieces, answers: tuple[str, ...], thing: str) -> int:
    """How many tokens the model may spend on its answer."""
    lengths = [len(pieces.spaced(answer)) for answer in answers]
    if len(answers) == 1:
        return max(NUMBER_TOKENS, lengths[0]) if thing == "number" else lengths[0] + 2
    return NUMBER_TOKENS + sum(length + _JOINING_TOKENS for length in lengths)


def _frame(pieces: Pieces, spec: NeedleTask, queries: list[str]) -> tuple[Ids, Ids]:
    """What stands before the context and after it."""
    head, tail = ONE if spec.num_answers == 1 else SEVERAL
    query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    names = {"thing": spec.thing, "things": f"{spec.thing}s", "query": query}
    return pieces.opening(head.format(**names)), pieces.joined(tail.format(**names))


def _hay(pieces: Pieces, spec: NeedleTask, rng: random.Random, taken: set[str]) -> Iterator[str]:
    if spec.haystack == "noise":
        return repeat(NOISE)
    return _prose(pieces, rng) if spec.haystack == "prose" else _distractors(spec, rng, taken)


def _prose(pieces: Pieces, rng: random.Random) -> Iterator[str]:
    """The sentences of the texts in a drawn order, again when all are used up."""
    order = list(pieces.texts)
    rng.shuffle(order)
    while True:
        for sentences in order:
            yield from sentences


def _distractors(spec: NeedleTask, rng: random.Random, taken: set[str]) -> Iterator[str]:
    while True:
        key = spec.key(rng)
        if key not in taken:
            yield SENTENCE.format(things=f"{spec.thing}s", key=key, value=spec.value(rng))


def _distinct(draw: Callable[[random.Random], str], count: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)
