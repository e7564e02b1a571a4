"""What every task owes: prompts of the exact length, which read as text, and the same whenever they are made."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.errors import CheckpointError, UsageError
from hybridize.evaluation.items import Item, score
from hybridize.evaluation.tasks import PROSE_TASKS, make_items
from hybridize.evaluation.windows import start_tokens
from hybridize.recipe.probes import RecallProbe
from tests.evaluation.tasks.conftest import MAKERS, PROSE, TASKS, tokenizer_of

CUT_TOKENS = 8
"""Where a haystack is cut, so many tokens may be others than those of the text."""


def make(tokenizer: Any, task: str, tokens: int = 1024, depth: float = 0.5, seed: int = 0) -> Item:
    [item] = make_items(grid(task, lengths=(tokens,), depths=(depth,)), tokenizer, PROSE, seed=seed)
    return item


def grid(*tasks: Any, lengths: tuple[int, ...] = (1024,), depths: tuple[float, ...] = (0.5,), samples: int = 1) -> Any:
    return RecallProbe(tasks=tasks, lengths=lengths, depths=depths, samples=samples)


def same(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(left))


def written(item: Item) -> str:
    """The answer as a model might write it."""
    if item.task == "common_words":
        return " ".join(f"{i}. {answer}" for i, answer in enumerate(item.answers, start=1))
    return ", and ".join(item.answers)


def check(item: Item, tokenizer: Any, tokens: int) -> None:
    """The invariants of an item."""
    assert len(item.prompt) == item.group == tokens
    assert all(0 <= start < end <= tokens for start, end in item.evidence)
    text = tokenizer.decode(item.prompt, skip_special_tokens=True)
    assert "  " not in text
    if item.targets:
        assert item.answers == ()
        assert item.answer_tokens == 0
        return
    assert text[-1] != " "
    assert item.needs == "all"
    wanted = len(tokenizer(written(item), add_special_tokens=False)["input_ids"])
    assert wanted <= item.answer_tokens <= 2 * wanted + 10
    assert score(item, ", ".join(item.answers)) == 1.0
    for answer in item.answers:
        assert answer in text


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [700, 1023, 1024, 1537, 4096])
def test_prompts_have_exactly_their_length(spoken: Any, task: str, tokens: int) -> None:
    check(make(spoken, task, tokens), spoken, tokens)


@pytest.mark.parametrize("task", sorted({*TASKS} - {"common_words", "variable_tracking"}))
def test_prompts_have_exactly_their_length_where_words_are_many_tokens(tokenizer: Any, task: str) -> None:
    for tokens in (1024, 1337):
        check(make(tokenizer, task, tokens), tokenizer, tokens)


@given(
    st.sampled_from(list(MAKERS)),
    st.sampled_from(TASKS),
    st.integers(60, 2500),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_property_a_prompt_has_its_length_or_is_refused(
    name: str, task: str, tokens: int, depth: float, seed: int
) -> None:
    tokenizer = tokenizer_of(name)
    try:
        item = make(tokenizer, task, tokens, depth, seed)
    except UsageError:
        assert tokens < 700
        return
    check(item, tokenizer, tokens)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [1024, 1537])
def test_the_tokens_are_those_of_the_text(spoken: Any, task: str, tokens: int) -> None:
    prompt = make(spoken, task, tokens).prompt[len(start_tokens(spoken)) :]
    text = spoken.decode(prompt)
    again = tuple(spoken(text, add_special_tokens=False)["input_ids"])
    first = same(prompt, again)
    last = same(prompt[::-1], again[::-1])
    assert max(len(prompt), len(again)) - first - last <= CUT_TOKENS
    if first < len(prompt):
        question = max(text.rfind("\nWhat "), text.rfind("\nQuestion: "))
        before = len(spoken.decode(prompt[: first + CUT_TOKENS]))
        assert before > question > 0, "the cut is just before the question"


def test_a_start_token_begins_the_prompt_and_counts(spoken: Any) -> None:
    for task in TASKS:
        prompt = make(spoken, task).prompt
        assert list(prompt[:1]) == (start_tokens(spoken) or list(prompt[:1]))
        assert spoken.bos_token_id not in prompt[1:]


@pytest.mark.parametrize("task", TASKS)
def test_an_item_does_not_depend_on_what_else_is_asked(task: str) -> None:
    tokenizer = tokenizer_of("byte-level")
    settings = grid(*TASKS, lengths=(700, 1024), depths=(0.25, 0.5), samples=2)
    everything = [item for item in make_items(settings, tokenizer, PROSE, seed=7) if item.task == task]
    assert everything[6] == make(tokenizer, task, seed=7)
    assert len({item.prompt for item in everything}) == len(everything) == 8


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_item_and_another_another(spoken: Any, task: str) -> None:
    item = make(spoken, task, seed=3)
    assert item == make(spoken, task, seed=3)
    assert item.prompt != make(spoken, task, seed=4).prompt


def test_items_come_in_the_order_task_length_depth_sample(tokenizer: Any) -> None:
    settings = grid("niah_single_2", "niah_single_1", lengths=(700, 500), depths=(0.9, 0.1), samples=2)
    items = make_items(settings, tokenizer, PROSE, seed=0)
    assert [(item.task, item.group, item.depth) for item in items] == [
        (task, tokens, depth)
        for task in ("niah_single_2", "niah_single_1")
        for tokens in (700, 500)
        for depth in (0.9, 0.1)
        for _ in range(2)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_a_length_without_room_is_refused(spoken: Any, task: str) -> None:
    tokens = 5 if task == "associative_recall" else 60
    with pytest.raises(UsageError, match=f"{tokens} tokens has no room .*{task}") as error:
        make(spoken, task, tokens)
    assert error.value.where == "evaluate.recall.lengths"
    assert "1024" in str(error.value)


@pytest.mark.parametrize("prose", [[], [""], [" \n", "\t"]])
def test_tasks_in_prose_need_prose(prose: list[str]) -> None:
    tokenizer = tokenizer_of("byte-level")
    for task in TASKS:
        if task not in PROSE_TASKS:
            assert len(make_items(grid(task), tokenizer, prose, seed=0)) == 1
            continue
        with pytest.raises(CheckpointError, match=f"{task} hides its needle in held-out prose") as error:
            make_items(grid("niah_single_1", task), tokenizer, prose, seed=0)
        assert error.value.where == "data.held_out"


def test_white_space_of_the_prose_does_not_matter() -> None:
    tokenizer = tokenizer_of("sentence-piece")
    loose = [re.sub(r" ", " \n\t ", text) for text in PROSE]
    settings = grid(*sorted(PROSE_TASKS))
    items = make_items(settings, tokenizer, PROSE, seed=0)
    assert items == make_items(settings, tokenizer, ["  ", *loose], seed=0)
    other = make_items(replace(settings), tokenizer, [PROSE[0]], seed=0)
    assert all(one.prompt != two.prompt for one, two in zip(items, other, strict=True))
