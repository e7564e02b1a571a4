"""Where needles stand, in what, and what is asked of them."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from typing import Any

import pytest

from hybridize.evaluation.items import Item
from hybridize.evaluation.tasks import PROSE_TASKS, make_items, needles
from hybridize.evaluation.tasks.needles import NEEDLES, NOISE
from hybridize.evaluation.tasks.pieces import split_sentences
from hybridize.recipe.probes import RecallProbe
from tests.evaluation.tasks.conftest import PROSE, tokenizer_of

NEEDLE = re.compile(r"One of the special magic (number|uuid)s for (\S+) is: (\S+)\.")
SENTENCES = {sentence for text in PROSE for sentence in split_sentences(text)}
HAS_PLACE = [name for name, spec in NEEDLES.items() if spec.num_answers == 1]
SEVERAL = ["niah_multivalue", "niah_multiquery"]
NEEDLE_LIKE = [f"One of the special magic uuids for {uuid.UUID(int=17**30)} is: {uuid.UUID(int=19**30)}."]
AMONG_NEEDLES = ["niah_multikey_2", "niah_multikey_3"]


def make(tokenizer: Any, task: Any, tokens: int = 1500, depth: float = 0.5, **more: Any) -> Item:
    settings = RecallProbe(tasks=(task,), lengths=(tokens,), depths=(depth,), samples=1)
    [item] = make_items(settings, tokenizer, **{"prose": PROSE, "seed": 0, **more})
    return item


def context_of(text: str) -> str:
    """What stands between the instruction and the question."""
    return text[text.index("\n") + 1 : text.rindex("\nWhat ")]


def question_of(text: str) -> str:
    return text[text.rindex("\nWhat ") + 1 :]


@pytest.mark.parametrize("task", HAS_PLACE)
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.35, 0.5, 0.9, 1.0])
def test_the_needle_stands_at_the_boundary_nearest_to_its_depth(spoken: Any, task: str, depth: float) -> None:
    item = make(spoken, task, depth=depth)
    [(start, end)] = item.evidence
    before, after = spoken.decode(item.prompt[:start]), spoken.decode(item.prompt[end:])
    assert before.rstrip(" ")[-1] in ".\n", "no sentence is cut in two"
    assert re.match(r"\s?[A-Z]", after)

    def tokens(hay: str) -> int:
        own = hay if task in AMONG_NEEDLES else NEEDLE.sub("", hay)
        return len(spoken(own, add_special_tokens=False)["input_ids"])

    hay_before, hay_after = tokens(before[before.index("\n") + 1 :]), tokens(after[: after.rindex("\nWhat ")])
    pieces = NEEDLE_LIKE if task in AMONG_NEEDLES else [NOISE] if task == "niah_single_1" else SENTENCES
    longest = max(map(tokens, pieces))
    distance = hay_before - depth * (hay_before + hay_after)
    # A piece that was cut stands at the end, with no boundary in it.
    assert abs(distance) <= longest / 2 + 3 or (distance < 0 and hay_after <= longest + 3)
    assert item.depth == depth


@pytest.mark.parametrize("task", NEEDLES)
def test_evidence_is_the_needles_that_are_asked_for(spoken: Any, task: str) -> None:
    item = make(spoken, task)
    spans = [spoken.decode(item.prompt[start:end]).strip() for start, end in item.evidence]
    found = [NEEDLE.fullmatch(span) for span in spans]
    assert [match and match[3] for match in found] == list(item.answers)
    question = question_of(spoken.decode(item.prompt))
    for match in found:
        assert match
        assert question.count(match[2]) == 2
        assert question.count(f" magic {match[1]}") == 2
    assert len(spans) == NEEDLES[task].num_answers


@pytest.mark.parametrize("task", NEEDLES)
def test_values_and_keys_are_what_the_task_says(spoken: Any, task: str) -> None:
    item, spec = make(spoken, task), NEEDLES[task]
    text = spoken.decode(item.prompt)
    needles = NEEDLE.findall(context_of(text))
    for thing, key, value in needles:
        assert thing == spec.thing
        if task == "niah_multikey_3":
            assert str(uuid.UUID(key)) == key
        else:
            assert re.fullmatch(r"[a-z]+-[a-z]+", key)
        if thing == "uuid":
            assert uuid.UUID(value).version == 4
        else:
            assert re.fullmatch(r"[1-9]\d{6}", value)
    assert all(text.count(value) == 1 for value in item.answers)
    if task in AMONG_NEEDLES:
        assert len(needles) > 10
    else:
        keys = Counter(key for _, key, _ in needles)
        assert len(keys) == spec.num_keys
        assert set(keys.values()) == {spec.num_values}


@pytest.mark.parametrize("task", NEEDLES)
def test_the_rest_is_hay(spoken: Any, task: str) -> None:
    context = context_of(spoken.decode(make(spoken, task).prompt))
    if task in PROSE_TASKS:
        hay = split_sentences(NEEDLE.sub("", context))
        assert {*hay[:-1]} <= SENTENCES
    else:
        hay = [line for line in context.split("\n") if task in AMONG_NEEDLES or not NEEDLE.fullmatch(line)]
        assert all(NEEDLE.fullmatch(line) if task in AMONG_NEEDLES else line == NOISE for line in hay[:-1])
        assert task in AMONG_NEEDLES or NOISE.startswith(hay[-1])
    assert len(hay) > 10


def test_nobody_else_has_the_key_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needles, "FIRST", ("old", "new"))
    monkeypatch.setattr(needles, "SECOND", ("door", "key"))
    tokenizer = tokenizer_of("byte-level")
    item = make(tokenizer, "niah_multikey_2")
    found = NEEDLE.findall(context_of(tokenizer.decode(item.prompt)))
    [value] = item.answers
    [asked] = [key for _, key, own in found if own == value]
    counts = Counter(key for _, key, _ in found)
    assert counts.pop(asked) == 1
    assert len(counts) == 3


@pytest.mark.parametrize("task", SEVERAL)
def test_where_several_are_asked_for_they_stand_anywhere(task: str) -> None:
    tokenizer = tokenizer_of("byte-level")
    items = [make(tokenizer, task, depth=0.5, seed=seed) for seed in range(20)]
    assert all(item.depth is None for item in items)
    places = [start / 1500 for item in items for start, _ in item.evidence]
    assert len({*places}) > 60
    thirds = Counter(int(3 * place) for place in places)
    assert min(thirds[i] for i in range(3)) > 10
    # Answers do not come in the order of their places.
    assert any(sorted(item.evidence) != list(item.evidence) for item in items)


def test_questions_name_all_keys() -> None:
    tokenizer = tokenizer_of("sentence-piece")
    item = make(tokenizer, "niah_multiquery")
    text = tokenizer.decode(item.prompt)
    keys = [
        key for start, end in item.evidence for _, key, _ in NEEDLE.findall(tokenizer.decode(item.prompt[start:end]))
    ]
    query = f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
    assert text.startswith("Some special magic numbers are hidden within the following text. Make sure to memorize it.")
    assert question_of(text) == (
        f"What are all the special magic numbers for {query} mentioned in the provided text? "
        f"The special magic numbers for {query} mentioned in the provided text are"
    )


def test_short_prose_is_repeated_and_long_prose_is_not() -> None:
    tokenizer = tokenizer_of("byte-level")
    text = tokenizer.decode(make(tokenizer, "niah_single_2", prose=["Only one sentence here. And another."]).prompt)
    assert text.count("Only one sentence here. And another.") > 40
    context = context_of(tokenizer.decode(make(tokenizer, "niah_single_2", 700).prompt))
    assert max(Counter(split_sentences(context)).values()) == 1


def test_texts_come_in_another_order_in_every_item() -> None:
    tokenizer = tokenizer_of("byte-level")
    contexts = [
        context_of(tokenizer.decode(make(tokenizer, "niah_single_2", 700, 0.9, seed=seed).prompt)) for seed in range(20)
    ]
    assert {context[:40] for context in contexts} == {text[:40] for text in PROSE}
