"""The tables: enough of everything, and every form has its places."""

from __future__ import annotations

from string import Formatter

import pytest

from hybridize.corpus.facts import forms
from hybridize.corpus.facts.kinds import KINDS, Kind
from hybridize.corpus.facts.names import NAMES
from hybridize.corpus.facts.values import VALUES


def fields(form: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(form) if name}


def test_there_is_variety() -> None:
    statements = [statement for kind in KINDS for statement in kind.statements]
    assert len(set(statements)) == len(statements) >= 40
    assert len({kind.domain for kind in KINDS}) >= 12
    assert len({kind.label for kind in KINDS}) == len(KINDS)
    assert {kind.entity for kind in KINDS} == set(NAMES)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.label)
def test_a_kind_is_whole(kind: Kind) -> None:
    assert kind.entity in NAMES
    assert kind.value in VALUES
    assert len(kind.statements) >= 3
    assert len(kind.questions) + len(kind.restatements) >= 3
    for form in (*kind.statements, *kind.restatements):
        assert fields(form) == {"e", "v"}, form
    for form in (*kind.questions, kind.label):
        assert fields(form) == {"e"}, form
    assert fields(kind.plural) <= {"e"}
    assert kind.plural != kind.label
    for form in kind.restatements:
        assert form.endswith(("{v}.", '{v}".')), form
    assert all(form.endswith(".") for form in kind.statements)
    assert all(form.endswith("?") for form in kind.questions)


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (forms.STATEMENTS, {"label", "v"}),
        (forms.RESTATEMENTS, {"label", "v"}),
        (forms.LINES, {"label", "v"}),
        (forms.CLOZES, {"label", "v"}),
        (forms.LIST_LINES, {"label", "v"}),
        (forms.AMONG, {"plural", "v"}),
        (forms.QUESTIONS, {"question", "v"}),
        (forms.QUIZ_LINES, {"letter", "question", "v"}),
        (forms.LABEL_QUESTION, {"label"}),
        (forms.TOGETHER, {"clauses"}),
        (forms.ALL_VALUES, {"plural", "values"}),
        (forms.HEADS + forms.TABLE_HEADS, set()),
    ],
)
def test_forms_for_any_kind_have_their_places(table: tuple[str, ...], wanted: set[str]) -> None:
    assert len(set(table)) == len(table)
    assert all({field.lower() for field in fields(form)} == wanted for form in table)
