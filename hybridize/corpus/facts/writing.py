"""Writes facts down: statements of them, and questions with their answers."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from hybridize.corpus.facts import forms
from hybridize.corpus.facts.fact import Fact, Mention

_OWN_SHARE = 0.7
"""Of statements in the words of the fact's kind; the others fit any kind."""
_OWN_QUESTIONS = 0.75
_OWN_RESTATEMENTS = 0.35


def state(fact: Fact, rng: random.Random) -> Mention:
    """A statement of one fact, the only one with this entity and kind."""
    own = rng.random() < _OWN_SHARE
    return Mention(fact.fill(rng.choice(fact.kind.statements if own else forms.STATEMENTS)), (fact,), asks=False)


def state_among(fact: Fact, rng: random.Random) -> Mention:
    """A statement of one of several values of an entity."""
    plural = fact.kind.plural.format(e=fact.entity)
    return Mention(rng.choice(forms.AMONG).format(plural=plural, v=fact.value), (fact,), asks=False)


def ask(fact: Fact, rng: random.Random) -> Mention:
    """A question for one fact with its answer."""
    writer = rng.choice((_asked, _asked, _restated, _restated, _line, _cloze))
    return Mention(writer(fact, rng), (fact,), asks=True)


def ask_together(facts: Sequence[Fact], rng: random.Random) -> Mention:
    """A question for several facts at once, in a drawn order."""
    facts = rng.sample(facts, len(facts))
    writer = rng.choice((_list, _table, _quiz, _sentence))
    return Mention(writer(facts, rng), tuple(facts), asks=True)


def ask_all(facts: Sequence[Fact], rng: random.Random) -> Mention:
    """A question for all values of one entity."""
    plural = facts[0].kind.plural.format(e=facts[0].entity)
    facts = rng.sample(facts, len(facts))
    values = _joined([fact.value for fact in facts], rng)
    return Mention(rng.choice(forms.ALL_VALUES).format(plural=plural, values=values), tuple(facts), asks=True)


def _question(fact: Fact, rng: random.Random) -> str:
    own = rng.random() < _OWN_QUESTIONS
    return fact.fill(rng.choice(fact.kind.questions if own else forms.LABEL_QUESTION))


def _asked(fact: Fact, rng: random.Random) -> str:
    return rng.choice(forms.QUESTIONS).format(question=_question(fact, rng), v=fact.value)


def _restated(fact: Fact, rng: random.Random) -> str:
    own = rng.random() < _OWN_RESTATEMENTS
    return fact.fill(rng.choice(fact.kind.restatements if own else forms.RESTATEMENTS))


def _line(fact: Fact, rng: random.Random) -> str:
    return fact.fill(rng.choice(forms.LINES))


def _cloze(fact: Fact, rng: random.Random) -> str:
    return fact.fill(rng.choice(forms.CLOZES))


def _list(facts: Sequence[Fact], rng: random.Random) -> str:
    line = rng.choice(forms.LIST_LINES)
    return "\n".join((rng.choice(forms.HEADS), *(fact.fill(line) for fact in facts)))


def _table(facts: Sequence[Fact], rng: random.Random) -> str:
    rows = (fact.fill("| {label} | {v} |") for fact in facts)
    return "\n".join((rng.choice(forms.TABLE_HEADS), "|---|---|", *rows))


def _quiz(facts: Sequence[Fact], rng: random.Random) -> str:
    line = rng.choice(forms.QUIZ_LINES)
    lettered = zip(string.ascii_lowercase, facts, strict=False)
    return "\n".join(line.format(letter=x, question=_question(fact, rng), v=fact.value) for x, fact in lettered)


def _sentence(facts: Sequence[Fact], rng: random.Random) -> str:
    clauses = _joined([fact.fill("the {label} is {v}") for fact in facts], rng)
    return rng.choice(forms.TOGETHER).format(clauses=clauses)


def _joined(parts: Sequence[str], rng: random.Random) -> str:
    *most, last = parts
    before_last = rng.choice((" and ", ", and ")) if len(most) > 1 else " and "
    return ", ".join(most) + before_last + last
