"""Items put to models whose answers are known."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridize.evaluation.asking import answers, ask, target_shares
from hybridize.evaluation.batches import CPU_TOKENS, batches_by_tokens, default_batch_tokens
from hybridize.evaluation.items import Item, score
from hybridize.progress import SILENT
from tests.evaluation.scripted import Scripted


def item(tokenizer: Any, text: str, *wanted: str, answer_tokens: int = 12, **more: Any) -> Item:
    prompt = tuple(tokenizer(text)["input_ids"])
    return Item("task", prompt, wanted, answer_tokens, len(prompt), **more)


def put(model: Any, tokenizer: Any, items: list[Item], batch_tokens: int = 10_000) -> list[float]:
    with SILENT.task("", None) as task:
        return ask(model, tokenizer, items, batch_tokens=batch_tokens, task=task)


def repeat_number(prompt: str) -> str:
    found = re.search(r"\d+", prompt)
    return f" it is {found[0]}" if found else " nothing"


def test_the_share_of_answers_found_is_the_score(tokenizer: Any) -> None:
    pair = item(tokenizer, "x", "4711", "The River")
    assert score(pair, "by the river: 4711") == 1.0
    assert score(pair, "4712, the\x00river") == 0.0
    assert score(pair, "4711") == 0.5
    assert score(item(tokenizer, "x", "a", "zz", needs="any"), "an ox") == 1.0
    assert score(item(tokenizer, "x", "b", "zz", needs="any"), "an ox") == 0.0


def test_scores_come_in_the_order_of_the_items(tokenizer: Any) -> None:
    texts = ["number 31 of many", "no number here", "a 7", "the long way to number 1234 and on"]
    items = [item(tokenizer, text, (re.findall(r"\d+", text) or ["nothing"])[0]) for text in texts]
    wrong = item(tokenizer, "number 5", "6")
    model = Scripted(tokenizer, repeat_number)
    assert put(model, tokenizer, [*items[:2], wrong, *items[2:]]) == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("batch_tokens", [1, 30, 60, 10_000])
def test_batches_change_nothing(tokenizer: Any, batch_tokens: int) -> None:
    items = [item(tokenizer, f"{'word ' * (i % 3)}number {i * 37}", str(i * 37), answer_tokens=8 + i) for i in range(7)]
    model = Scripted(tokenizer, repeat_number)
    with SILENT.task("", None) as task:
        texts = answers(model, tokenizer, items, batch_tokens=batch_tokens, task=task)
    alone = [answers(model, tokenizer, [one], batch_tokens=1, task=task)[0] for one in items]
    assert texts == alone
    for sequences, tokens in model.batches:
        assert sequences == 1 or sequences * tokens <= batch_tokens


def test_a_neighbour_with_a_longer_answer_lends_no_tokens(tokenizer: Any) -> None:
    needed = len(tokenizer(" it is 4711")["input_ids"])
    short = item(tokenizer, "number 4711", "4711", answer_tokens=needed - 1)
    long = item(tokenizer, "number 4711", "4711", answer_tokens=needed)
    assert put(Scripted(tokenizer, repeat_number), tokenizer, [short, long, short]) == [0, 1, 0]


def test_targets_are_scored_by_one_pass_without_generation(tokenizer: Any, teacher: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    items = []
    for length in (9, 14, 9):
        prompt = torch.randint(3, 300, (length,), generator=generator)
        with torch.no_grad():
            best = teacher(prompt[None]).logits[0].argmax(-1).tolist()
        targets = ((2, best[2]), (5, best[5] + 1), (length - 1, best[-1]))
        items.append(Item("t", tuple(prompt.tolist()), (), 0, length, targets=targets))
    for batch_tokens in (1, 1000):
        with SILENT.task("", None) as task:
            assert target_shares(teacher, items, batch_tokens=batch_tokens, task=task) == pytest.approx([2 / 3] * 3)
    mixed = [items[0], item(tokenizer, "the old king", " ", answer_tokens=3), items[1]]
    scores = put(teacher, tokenizer, mixed)
    assert (scores[0], scores[2]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert scores[1] in (0.0, 1.0)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_everything_once_and_no_more_than_fits_property(lengths: list[int], batch_tokens: int) -> None:
    batches = list(batches_by_tokens(lengths, batch_tokens, lambda n: n))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens


def test_a_cpu_gets_small_batches(teacher: Any) -> None:
    assert default_batch_tokens([teacher], torch.device("cpu")) == CPU_TOKENS


def test_a_gpu_gets_what_its_memory_holds(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 2**34}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 2**40))
    device = torch.device("cuda")
    most = default_batch_tokens([teacher], device)
    free["bytes"] = 2**27
    fewer = default_batch_tokens([teacher], device)
    assert CPU_TOKENS < fewer < most
    config = teacher.config
    cached = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert fewer * cached < free["bytes"] / 2
