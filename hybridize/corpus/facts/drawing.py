"""Draws the facts of a document: alone, among their like, several of one thing, several values of one attribute."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybridize.corpus.facts.fact import Fact, Mention
from hybridize.corpus.facts.kinds import KINDS, Kind
from hybridize.corpus.facts.names import NAMES
from hybridize.corpus.facts.values import VALUES, draw_value
from hybridize.corpus.facts.writing import ask, ask_all, ask_together, state, state_among

MOST_TOGETHER = 5
"""Facts that are drawn as one group."""
_ONE_KIND_SHARE = 0.2
"""Of documents whose facts are all of one kind, so that only the entity tells them apart."""
_GROUPS = ("alone", "alone", "alike", "alike", "of one thing", "of one attribute")
_TOGETHER_SHARE = 0.4
"""Of groups that are asked for at once."""
_NEVER_ASKED_SHARE = 0.2
"""Of facts; they stand there to be told apart from the others."""
_MOST_QUESTIONS = 3


@dataclass(frozen=True)
class Thread:
    """Statements, which may stand anywhere, and the questions that come after all of them, one after the other."""

    statements: tuple[Mention, ...]
    questions: tuple[Mention, ...]


class Drawer:
    """Draws for one document. No two facts have a value in common, and no name is a part of another one."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._names: set[str] = set()
        self._values: set[str] = set()
        self._only = rng.choice(KINDS) if rng.random() < _ONE_KIND_SHARE else None

    def threads(self, count: int) -> Iterator[Thread]:
        """Threads with `count` facts in all."""
        while count > 0:
            facts = self._group(count)
            yield from self._threads_of(facts)
            count -= len(facts)

    def _group(self, most: int) -> list[Fact]:
        rng = self._rng
        sort = rng.choice(_GROUPS) if most > 1 else "alone"
        if self._only and sort != "alone":
            sort = "alike"
        size = 1 if sort == "alone" else rng.randint(2, min(most, MOST_TOGETHER))
        kind = self._only or rng.choice(_WITH_PLURAL if sort == "of one attribute" else KINDS)
        if sort in ("alone", "alike"):
            return [Fact(kind, self._entity(kind), self._value(kind)) for _ in range(size)]
        own = _KINDS_OF[kind.entity]
        kinds = [kind] * size if sort == "of one attribute" else rng.sample(own, min(size, len(own)))
        entity = self._entity(kind)
        return [Fact(kind, entity, self._value(kind)) for kind in kinds]

    def _threads_of(self, facts: Sequence[Fact]) -> Iterator[Thread]:
        rng = self._rng
        if len({(fact.kind.label, fact.entity) for fact in facts}) < len(facts):
            yield Thread(tuple(state_among(fact, rng) for fact in facts), (ask_all(facts, rng),))
        elif len(facts) > 1 and rng.random() < _TOGETHER_SHARE:
            yield Thread(tuple(state(fact, rng) for fact in facts), (ask_together(facts, rng),))
        else:
            for fact in facts:
                times = 0 if rng.random() < _NEVER_ASKED_SHARE else rng.randint(1, _MOST_QUESTIONS)
                yield Thread((state(fact, rng),), tuple(ask(fact, rng) for _ in range(times)))

    def _entity(self, kind: Kind) -> str:
        while True:
            found = NAMES[kind.entity](self._rng)
            if not any(found in name or name in found for name in self._names):
                self._names.add(found)
                return found

    def _value(self, kind: Kind) -> str:
        while (found := draw_value(VALUES[kind.value], self._rng)) in self._values | self._names:
            pass
        self._values.add(found)
        return found


_WITH_PLURAL = tuple(kind for kind in KINDS if kind.plural)
_KINDS_OF: dict[str, list[Kind]] = defaultdict(list)
for _kind in KINDS:
    _KINDS_OF[_kind.entity].append(_kind)
