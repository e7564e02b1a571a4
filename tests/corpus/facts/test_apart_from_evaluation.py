"""Nothing that a probe asks is trained on: no key of theirs, no run of words, no form of value."""

from __future__ import annotations

import ast
import random
import re
from itertools import product
from pathlib import Path

import pytest

from hybridize.corpus.facts import forms, vocabulary
from hybridize.corpus.facts.fact import FactDocument
from hybridize.corpus.facts.kinds import KINDS
from hybridize.corpus.facts.names import NAMES
from hybridize.evaluation.tasks.needles import NEEDLES, NOISE, ONE, SENTENCE
from hybridize.evaluation.tasks.vocabulary import FIRST, SECOND, compounds

EVALUATION = Path(__file__).resolve().parents[3] / "hybridize" / "evaluation"
RUN_WORDS = 5
Documents = tuple[FactDocument, ...]


def runs(text: str) -> set[tuple[str, ...]]:
    """Every five words in succession; a place for a value counts as one."""
    words = ["_" if word[0] == "{" else word for word in re.findall(r"\{\w*\}|[a-z']+|\d+", text.lower())]
    return {tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)}


def probes_say() -> set[tuple[str, ...]]:
    """Runs of words in every string of the modules of recall and reading, docstrings included."""
    found = set()
    for path in (*EVALUATION.glob("tasks/*.py"), *EVALUATION.glob("reading/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= runs(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                found |= runs("".join(map(str, parts)))
    return found


def own_forms() -> list[str]:
    tables = [value for name, value in vars(forms).items() if name.isupper()]
    found = [form for table in tables for form in table]
    for kind in KINDS:
        found += [kind.label, kind.plural, *kind.statements, *kind.questions, *kind.restatements]
    return found


def test_the_runs_of_the_probes_are_known() -> None:
    said = probes_say()
    assert runs(SENTENCE) | runs(NOISE) | runs(ONE[1]) <= said
    assert ("find", "all", "variables", "that", "are") in said


def test_no_form_has_five_words_in_succession_of_a_probe() -> None:
    said = probes_say()
    assert len(own_forms()) > 400
    assert {form: runs(form) & said for form in own_forms() if runs(form) & said} == {}


def test_no_text_has_five_words_in_succession_of_a_probe(documents: Documents) -> None:
    said = probes_say()
    texts = [placed.mention.text for document in documents for placed in document.mentions]
    assert [text for text in texts if runs(text) & said] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_a_key(name: str) -> None:
    rng = random.Random(name)
    keys = {*FIRST, *SECOND, *compounds()}
    for _ in range(2000):
        drawn = NAMES[name](rng).lower()
        assert drawn not in keys
        assert not keys.intersection(re.findall(r"[a-z]+-[a-z]+", drawn))


def test_no_coined_word_is_a_key() -> None:
    tables = (vocabulary.SURNAME_TAILS, vocabulary.PLACE_TAILS, vocabulary.COINED_TAILS, vocabulary.GENUS_TAILS)
    tails = [tail for table in tables for tail in table]
    assert {head.lower() + tail for head, tail in product(vocabulary.HEADS, tails)}.isdisjoint({*FIRST, *SECOND})


def test_no_mention_looks_like_a_probe(documents: Documents) -> None:
    assert {spec.thing for spec in NEEDLES.values()} == {"number", "uuid"}
    marks = {
        "a number of seven digits": r"(?<!\d)\d{7}(?!\d)",
        "a UUID": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}",
        "an assignment": r"\bVAR\b",
        "magic": r"(?i)\bmagic\b",
        "a pair of words": r"(?m)^[a-z]+: [a-z]+$",
        "a numbered word": r"(?m)\b\d+\. [a-z]+\b",
        "a question of the reading probe": r"Question:[^\n]*\nAnswer:",
        "a record of the reading probe": r"(?m)^Name: .*\n[A-Z][A-Za-z-]*:",
    }
    texts = [placed.mention.text for document in documents for placed in document.mentions]
    found = {name: [text for text in texts if re.search(mark, text)] for name, mark in marks.items()}
    assert {name: seen[:3] for name, seen in found.items() if seen} == {}
