"""Pairs, queries, and the gaps between them, read again from the tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.evaluation.items import Item
from hybridize.evaluation.tasks import make_items
from hybridize.evaluation.tasks.associative import MOST_PAIRS
from hybridize.evaluation.windows import start_tokens
from hybridize.recipe.probes import RecallProbe
from tests.evaluation.tasks.conftest import MAKERS, tokenizer_of


def make(tokenizer: Any, tokens: int, seed: int = 0) -> Item:
    settings = RecallProbe(tasks=("associative_recall",), lengths=(tokens,), depths=(0.5,), samples=1)
    [item] = make_items(settings, tokenizer, [], seed=seed)
    return item


def check(item: Item, tokenizer: Any, num_pairs: int) -> None:
    """Reads the lines from the beginning: the pairs, then the queries among others."""
    body = item.prompt[len(start_tokens(tokenizer)) :]
    offset = len(item.prompt) - len(body)
    colon, end = (tokenizer.convert_tokens_to_ids(tokenizer.tokenize(f"a{mark}"))[-1] for mark in (":", "\n"))
    lines = [body[i : i + 4] for i in range(0, len(body) - 3, 4)]
    assert all(line[1] == colon and line[3] == end for line in lines)
    pairs = {line[0]: line[2] for line in lines[:num_pairs]}
    assert len({*pairs, *pairs.values()}) == 2 * num_pairs, "every key and every value is a word of its own"
    assert item.evidence == tuple((offset + 4 * i, offset + 4 * i + 4) for i in range(num_pairs))
    queries = [(i, key, value) for i, (key, _, value, _) in enumerate(lines) if i >= num_pairs and key in pairs]
    assert sorted(key for _, key, _ in queries) == sorted(pairs)
    assert all(pairs[key] == value for _, key, value in queries)
    # The score is taken where the colon has been read and the value comes.
    assert item.targets == tuple((offset + 4 * i + 1, value) for i, _, value in queries)
    assert all(item.prompt[position + 1] == token for position, token in item.targets)
    asked = {i for i, _, _ in queries}
    rest = {token for i, line in enumerate(lines) if i >= num_pairs and i not in asked for token in (line[0], line[2])}
    assert not rest & {*pairs, *pairs.values()}, "nobody else speaks of them"


@pytest.mark.parametrize(
    ("tokens", "num_pairs"), [(9, 1), (63, 1), (64, 2), (1000, 31), (1024, 32), (8192, 256), (9001, 256)]
)
def test_pairs_come_first_and_every_key_once_more(spoken: Any, tokens: int, num_pairs: int) -> None:
    assert num_pairs <= MOST_PAIRS
    check(make(spoken, tokens), spoken, num_pairs)


@given(st.sampled_from(list(MAKERS)), st.integers(9, 3000), st.integers(0, 10**6))
def test_property_items_hold_what_they_ask(name: str, tokens: int, seed: int) -> None:
    check(make(tokenizer_of(name), tokens, seed), tokenizer_of(name), max(1, tokens // 32))


def test_keys_and_values_are_words(spoken: Any) -> None:
    item = make(spoken, 1024)
    for line in spoken.decode(item.prompt[item.evidence[0][0] :]).strip().split("\n")[:32]:
        key, value = line.strip().split(": ")
        assert key.isalpha()
        assert key.islower()
        assert value.isalpha()
        assert value.islower()


def test_where_words_are_few_any_ordinary_token_is_one(tokenizer: Any) -> None:
    item = make(tokenizer, 1024)
    tokens = [token for start, _ in item.evidence for token in (item.prompt[start], item.prompt[start + 2])]
    assert len({*tokens}) == 64
    assert not {*tokens} & {*tokenizer.all_special_ids}


def test_gaps_have_a_power_law() -> None:
    """The first pair's query is drawn first, so that its slot is distributed as in the paper, without the others."""
    tokenizer = tokenizer_of("byte-level")
    tokens, num_pairs, draws = 128, 4, 3000
    slots = tokens // 4 - num_pairs
    weights = np.arange(1, slots + 1) ** (0.01 - 1)
    found: Counter[int] = Counter()
    for item in make_many(tokenizer, tokens, draws):
        value = item.prompt[2]
        [position] = [at for at, token in item.targets if token == value]
        found[position // 4 - num_pairs] += 1
    shares = np.array([found[slot] / draws for slot in range(slots)])
    expected = weights / weights.sum()
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 * 0.75 / draws)
    assert shares[0] == pytest.approx(expected[0], abs=0.03)


def make_many(tokenizer: Any, tokens: int, count: int) -> list[Item]:
    settings = RecallProbe(tasks=("associative_recall",), lengths=(tokens,), depths=(0.5,), samples=count)
    return make_items(settings, tokenizer, [], seed=0)
