"""Facts of a document can be told apart, whatever is drawn."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.corpus.facts.drawing import MOST_TOGETHER, Drawer, Thread
from hybridize.corpus.facts.fact import Fact


def facts_of(threads: list[Thread]) -> list[Fact]:
    return [fact for thread in threads for mention in thread.statements for fact in mention.facts]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 24])
def test_there_are_as_many_facts_as_were_asked_for(count: int) -> None:
    for seed in range(50):
        assert len(facts_of([*Drawer(random.Random(seed)).threads(count)])) == count


@pytest.fixture(scope="module")
def draws() -> list[list[Thread]]:
    return [[*Drawer(random.Random(seed)).threads(24)] for seed in range(300)]


def test_no_two_facts_of_a_document_share_a_value(draws: list[list[Thread]]) -> None:
    for threads in draws:
        values = [fact.value for fact in facts_of(threads)]
        assert len(set(values)) == len(values)
        assert {fact.entity for fact in facts_of(threads)}.isdisjoint(values)


def test_no_name_is_part_of_another(draws: list[list[Thread]]) -> None:
    for threads in draws:
        names = {fact.entity for fact in facts_of(threads)}
        assert [pair for pair in combinations(sorted(names), 2) if pair[0] in pair[1] or pair[1] in pair[0]] == []


def test_some_documents_have_one_kind_only_and_some_facts_are_never_asked(draws: list[list[Thread]]) -> None:
    kinds = [{fact.kind.label for fact in facts_of(threads)} for threads in draws]
    assert 0.1 < sum(len(found) == 1 for found in kinds) / len(draws) < 0.3
    asked = [bool(thread.questions) for threads in draws for thread in threads]
    assert 0.05 < asked.count(False) / len(asked) < 0.3


@given(st.integers(0, 10**9))
def test_property_a_question_asks_for_facts_of_its_thread(seed: int) -> None:
    for thread in Drawer(random.Random(seed)).threads(24):
        assert 1 <= len(thread.statements) <= MOST_TOGETHER
        own = {fact for mention in thread.statements for fact in mention.facts}
        assert all(not mention.asks for mention in thread.statements)
        assert all(mention.asks and set(mention.facts) == own for mention in thread.questions)
