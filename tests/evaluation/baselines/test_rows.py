"""The table of policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridize.errors import RecipeError
from hybridize.evaluation.baselines.in_place import budget_in_place
from hybridize.evaluation.baselines.measurement import Measurement
from hybridize.evaluation.baselines.rows import baselines, policy_rows
from hybridize.evaluation.items import Item
from hybridize.evaluation.windows import Window
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from hybridize.progress import SILENT
from hybridize.recipe.probes import BaselinesProbe
from tests.evaluation.conftest import VOCABULARY
from tests.tiny import tiny_teacher

EVICTION = {"mixer": "token_eviction", "window_tokens": 9, "budget_tokens": 7, "sink_tokens": 2}


@pytest.fixture(scope="module")
def student() -> Any:
    model = tiny_teacher(vocab_size=VOCABULARY, num_hidden_layers=3)
    configs = [config_from_dict(dict(c)) for c in (EVICTION, {"mixer": "full_attention"}, EVICTION)]
    return swap(model, configs)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny_teacher(vocab_size=VOCABULARY, num_hidden_layers=3)


def windows(count: int, tokens: int) -> list[Window]:
    generator = torch.Generator().manual_seed(4)
    return [
        Window(tuple(torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()), "s", str(n))
        for n in range(count)
    ]


def measure(student: Any, teacher: Any, tokenizer: Any, **changes: Any) -> Any:
    probe = BaselinesProbe(context_tokens=60, **changes)
    texts = windows(2, 60)
    # Prompts of two lengths, which must not be padded to one.
    items = [Item("t", window.tokens[:length], (" ",), 2, length) for window in texts for length in (30, 40)]
    with SILENT.task("", None) as task:
        return baselines(student, teacher, tokenizer, probe, items, texts, seed=0, batch_tokens=500, task=task)


def test_every_policy_at_every_budget_beside_the_learned_and_the_full(
    student: Any, teacher: Any, tokenizer: Any
) -> None:
    tokens = torch.tensor([windows(1, 60)[0].tokens])
    with torch.no_grad():
        before = [model(tokens, use_cache=False).logits for model in (student, teacher)]
    row = measure(student, teacher, tokenizer, budgets=(4, 8))
    policies = list(BaselinesProbe().policies)
    assert [(r["policy"], r["budget"]) for r in row["rows"]] == [
        ("full", None),
        *((policy, budget) for budget in (4, 8) for policy in (*policies, "learned")),
    ]
    assert (row["window_tokens"], row["sink_tokens"], row["layers"]) == (9, 2, [0, 2])
    assert all(r["tokens"] == 2 * 30 and r["recall"]["t"]["40"]["samples"] == 2 for r in row["rows"])
    for model, logits in zip((student, teacher), before, strict=True):
        with torch.no_grad():
            assert torch.equal(model(tokens, use_cache=False).logits, logits)


def test_without_budgets_it_is_the_students_own(student: Any, teacher: Any, tokenizer: Any) -> None:
    row = measure(student, teacher, tokenizer, policies=("random",))
    assert [(r["policy"], r["budget"]) for r in row["rows"]] == [("full", None), ("random", 7), ("learned", 7)]


def test_layers_of_different_budgets_keep_them(teacher: Any, tokenizer: Any) -> None:
    def student(*budgets: int) -> Any:
        configs = [config_from_dict({**EVICTION, "budget_tokens": budget}) for budget in budgets]
        return swap(tiny_teacher(vocab_size=VOCABULARY, num_hidden_layers=3), configs)

    mixed = measure(student(3, 7, 11), teacher, tokenizer, policies=("key_norm", "last_attention"))["rows"]
    assert [row["budget"] for row in mixed] == [None] * 4
    alike = measure(student(7, 7, 7), teacher, tokenizer, policies=("key_norm", "last_attention"))["rows"]
    assert [row["budget"] for row in alike] == [None, 7, 7, 7]
    assert mixed[0]["perplexity"] == alike[0]["perplexity"]
    assert all(m["perplexity"] != a["perplexity"] for m, a in zip(mixed[1:], alike[1:], strict=True))
    # One budget for all: the same layers, whatever they had.
    given = measure(student(3, 7, 11), teacher, tokenizer, policies=("key_norm", "last_attention"), budgets=(7,))
    assert given["rows"] == alike


def test_a_budget_and_window_for_everything_give_the_full_perplexity(
    student: Any, teacher: Any, tokenizer: Any
) -> None:
    rows = measure(student, teacher, tokenizer, budgets=(80,))["rows"]
    assert all(
        r["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4) for r in rows if r["policy"] != "learned"
    )
    rows = measure(student, teacher, tokenizer, budgets=(80,), window_tokens=64)["rows"]
    assert all(r["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4) for r in rows)


def test_prompts_of_several_lengths_are_asked_without_padding(student: Any, teacher: Any, tokenizer: Any) -> None:
    texts = windows(3, 60)
    items = [
        Item("t", window.tokens[:length], answers, 3, length)
        for length in (40, 21)
        for window, answers in zip(texts, (("",), ("no byte says this",), ("",)), strict=True)
    ]
    probe = BaselinesProbe(policies=("last_attention", "key_norm"), context_tokens=60)
    with SILENT.task("", None) as task:
        row = baselines(student, teacher, tokenizer, probe, items, texts, seed=0, batch_tokens=4096, task=task)
    assert row is not None
    for measured in row["rows"]:
        cells = measured["recall"]["t"]
        assert {length: (cell["samples"], cell["share"]) for length, cell in cells.items()} == {
            "40": (3, pytest.approx(2 / 3)),
            "21": (3, pytest.approx(2 / 3)),
        }


def test_a_teacher_alone_has_rows(teacher: Any, tokenizer: Any) -> None:
    advanced = []

    class Counting:
        def advance(self, steps: float = 1, **fields: str) -> None:
            advanced.append(steps)

    measure = Measurement(tokenizer, [], windows(2, 60), 30, 60, 500, Counting())
    rows = [
        row
        for budget in (4, 80)
        for row in policy_rows(
            teacher,
            {1: TokenEvictionConfig(window_tokens=9, sink_tokens=2, budget_tokens=budget)},
            ("recency", "key_norm"),
            measure,
            seed=0,
        )
    ]
    assert [(row["policy"], row["budget"], row["recall"]) for row in rows] == [
        ("recency", 4, {}),
        ("key_norm", 4, {}),
        ("recency", 80, {}),
        ("key_norm", 80, {}),
    ]
    full = measure(teacher, "full", None)["perplexity"]
    assert [row["perplexity"] == pytest.approx(full, rel=1e-4) for row in rows] == [False, False, True, True]
    assert sum(advanced) == 5


def test_an_impossible_budget_is_refused_before_anything_is_measured(
    student: Any, teacher: Any, tokenizer: Any
) -> None:
    # No teacher is there to be asked: the refusal comes first.
    with pytest.raises(RecipeError, match="must be at least 2"):
        measure(student, None, tokenizer, budgets=(8, 1))


def test_a_student_that_does_not_evict_has_no_row(teacher: Any, tokenizer: Any) -> None:
    assert measure(teacher, teacher, tokenizer) is None


def test_a_budget_is_changed_for_a_while(student: Any) -> None:
    configs = [layer.self_attn.config for layer in (student.model.layers[0], student.model.layers[2])]

    def fail_inside() -> None:
        with budget_in_place(student, 5, 8):
            inside = student.model.layers[2].self_attn
            assert (inside.config.budget_tokens, inside.config.window_tokens) == (5, 8)
            assert inside.new_state(1, torch.device("cpu"), torch.float32)["keys"].shape[2] == 13
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [layer.self_attn.config for layer in (student.model.layers[0], student.model.layers[2])] == configs
