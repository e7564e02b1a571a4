"""Aggregation over words, and variables: counted again in the text of the prompt."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest

from hybridize.evaluation.items import Item
from hybridize.evaluation.tasks import make_items
from hybridize.evaluation.tasks.needles import NOISE
from hybridize.evaluation.tasks.vocabulary import FIRST, SECOND, compounds, plain_words
from hybridize.evaluation.tasks.words import CODE_QUESTION, LIST_HEAD, LIST_QUESTION
from hybridize.recipe.probes import RecallProbe
from tests.evaluation.tasks.conftest import tokenizer_of

ENTRY = re.compile(r"(\d+)\. (\S+)")


def make(tokenizer: Any, task: Any, tokens: int, seed: int = 0) -> tuple[Item, str]:
    """The item and its text."""
    settings = RecallProbe(tasks=(task,), lengths=(tokens,), depths=(0.5,), samples=1)
    [item] = make_items(settings, tokenizer, [], seed=seed)
    return item, tokenizer.decode(item.prompt, skip_special_tokens=True)


def entries(text: str) -> list[str]:
    """The words of a numbered list."""
    found = ENTRY.findall(text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


def asked_about(text: str, answers: tuple[str, ...]) -> Counter[str]:
    """How often each word stands in the last list of the text. What is cut at its end is left out."""
    words = entries(text.split(LIST_HEAD)[-1].removesuffix(f"\n{LIST_QUESTION}"))
    return Counter(words if words[-1] in answers else words[:-1])


@pytest.mark.parametrize(
    ("tokens", "common", "uncommon", "example_common", "example_uncommon", "example_words"),
    [(1024, 6, 1, 3, 1, 20), (4095, 6, 1, 3, 1, 20), (4096, 30, 3, 10, 3, 40), (9000, 30, 3, 10, 3, 40)],
)
def test_common_words_have_rulers_frequencies(
    spoken: Any, tokens: int, common: int, uncommon: int, example_common: int, example_uncommon: int, example_words: int
) -> None:
    item, text = make(spoken, "common_words", tokens)
    empty, example, list_ = text.split(LIST_HEAD)
    assert empty == ""
    assert list_.endswith(f"\n{LIST_QUESTION}")
    counts = asked_about(text, item.answers)
    assert {counts[word] for word in item.answers} == {common}
    assert len(item.answers) == 10
    last_words = entries(list_)[-tokens // 40 :]
    assert {*last_words} & {*item.answers}, "the list is shuffled"
    others = {word: count for word, count in counts.items() if word not in item.answers}
    # Words after the last whole group fill the prompt, once each.
    assert max(others.values()) == uncommon
    assert sum(count < uncommon for count in others.values()) <= 3 * uncommon

    shown, solution = example.removesuffix("\n").split(f"\n{LIST_QUESTION} ")
    example_counts = Counter(entries(shown))
    solved = entries(solution)
    assert [example_counts[word] for word in solved] == [example_common] * 10
    assert {example_counts[word] for word in example_counts if word not in solved} == {example_uncommon}
    assert len(example_counts) == example_words
    assert not {*example_counts} & {*counts}


def test_where_a_list_of_the_longer_kind_does_not_fit_it_is_one_of_the_shorter(tokenizer: Any) -> None:
    item, text = make(tokenizer, "common_words", 4096)
    counts = asked_about(text, item.answers)
    assert {counts[word] for word in item.answers} == {6}


def test_words_do_not_run_out() -> None:
    tokenizer = tokenizer_of("byte-level")
    item, text = make(tokenizer, "common_words", 131072)
    counts = asked_about(text, item.answers)
    assert sorted(word for word, count in counts.items() if count > 3) == sorted(item.answers)
    assert {*counts} <= {*compounds()}


def test_words_are_many_and_each_is_one() -> None:
    assert len(plain_words()) == len({*FIRST, *SECOND}) > 1000
    assert len(compounds()) == len({*compounds()}) > 100_000
    assert all(re.fullmatch(r"[a-z]+", word) for word in plain_words())


@pytest.mark.parametrize("tokens", [500, 1024, 4096, 8192])
def test_coded_words_have_zipf_frequencies(spoken: Any, tokens: int) -> None:
    item, text = make(spoken, "frequent_words", tokens)
    head, tail = "Find the three most frequently appeared coded words. ", f"\n{CODE_QUESTION}"
    assert text.endswith(tail)
    # The dots that fill the prompt stand at its end.
    counts = Counter(re.sub(r"[ .]*$", "", text.split(head)[1].removesuffix(tail)).split(" "))
    assert [word for word, _ in counts.most_common(4)][1:] == list(item.answers)
    middle = len(text) // 2
    assert tokens < 1024 or all(word in text[:middle] and word in text[middle:] for word in item.answers)
    assert all(re.fullmatch(r"[a-z]{6}", word) for word in counts if word != "...")
    coded = [count for word, count in counts.most_common() if word != "..."]
    # k-th count floor(n / (k² ζ(2))), k = 1 being the dots': some n gives all of them.
    fits = [
        total
        for total in range(2 * sum(counts.values()) + 10)
        if [int(total * 6 / (math.pi * rank) ** 2) for rank in range(2, len(coded) + 2)] == coded
    ]
    assert fits
    # The last run of dots, filling aside, belongs to the text.
    assert counts["..."] <= int(fits[-1] * 6 / math.pi**2)
    assert counts["..."] >= 0.9 * int(fits[0] * 6 / math.pi**2) - 3
    assert len(coded) < max(tokens // 50, 5)


def test_coded_words_differ_from_item_to_item() -> None:
    tokenizer = tokenizer_of("byte-level")
    assert len({make(tokenizer, "frequent_words", 500, seed)[0].answers for seed in range(10)}) == 10


def statements(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^VAR ([A-Z]+) = (?:VAR )?([A-Z0-9]+)$", text, re.MULTILINE)


def chain(found: list[tuple[str, str]], value: str) -> list[str]:
    """Every variable that has the value, found by following assignments in the order of the text."""
    known: list[str] = []
    for name, source in found:
        if source == value or source in known:
            known.append(name)
    return known


@pytest.mark.parametrize("tokens", [700, 1024, 5000])
def test_variables_are_tracked_through_noise(spoken: Any, tokens: int) -> None:
    item, text = make(spoken, "variable_tracking", tokens)
    instruction = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    empty, example, asked = text.split(instruction)
    assert empty == ""
    for part, letters in ((example, 3), (asked, 5)):
        context, question = part.split("Question: ")
        value = re.match(r"Find all variables that are assigned the value (\d{5}) in the text above\. ", question)
        assert value
        prefix = (
            "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
            f"value {value[1]}, they are:"
        )
        found = statements(context)
        names = chain(found, value[1])
        assert [name for name, _ in found] == names
        assert len(names) == 5
        assert all(len(name) == letters for name in names)
        lines = [line for line in context.split("\n")[:-1] if not line.startswith("VAR ")]
        assert all(line == NOISE for line in lines[:-1])
        assert NOISE.startswith(lines[-1])
        ending = question[value.end() :]
        if part is example:
            assert lines == [NOISE] * 5
            assert ending == f"{prefix} {' '.join(names)}\n\n"
        else:
            assert ending == prefix
            assert tuple(names) == item.answers
    spans = [spoken.decode(item.prompt[start:end]) for start, end in item.evidence]
    assert statements("".join(spans)) == statements(asked)


def test_statements_stand_anywhere() -> None:
    tokenizer = tokenizer_of("byte-level")
    first = [make(tokenizer, "variable_tracking", 3000, seed)[0].evidence[0][0] for seed in range(30)]
    last = [make(tokenizer, "variable_tracking", 3000, seed)[0].evidence[-1][0] for seed in range(30)]
    assert len({*first}) > 15
    assert min(first) < 1000
    assert max(last) > 2700
