"""Recall with models whose answers are known, and the greedy loop under it."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridize.evaluation.generation import greedy, prompt_ids
from hybridize.evaluation.recall import NUMBER_TOKENS, answer_tokens, make_questions, recall
from hybridize.progress import SILENT
from hybridize.recipe.documents import Document
from hybridize.recipe.probes import RecallProbe


class Reader:
    """Answers as a model would that reads the first `reach` characters of its prompt."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=2)

    def __init__(self, tokenizer: Any, reach: float = 1.0, prefix: str = " ") -> None:
        self.tokenizer, self.reach, self.prefix = tokenizer, reach, prefix

    def generate(self, input_ids: Any, attention_mask: Any, generation_config: Any) -> Any:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            seen = prompt[: int(len(prompt) * self.reach)]
            found = re.search(r"is: (\S+)\.", seen)
            answer = self.prefix + (found[1] if found else "a riddle")
            new = self.tokenizer(answer)["input_ids"][: generation_config.max_new_tokens]
            rows.append([*ids.tolist(), *new, *([2] * (generation_config.max_new_tokens - len(new)))])
        return torch.tensor(rows)


@pytest.fixture
def questions(tokenizer: Any, documents: list[Document]) -> Any:
    settings = RecallProbe(lengths=(500, 700), depths=(0.1, 0.9), samples=2)
    return make_questions(settings, tokenizer, [document.text for document in documents], seed=0)


def ask(models: dict[str, Any], tokenizer: Any, questions: Any, batch_sequences: int = 1) -> dict[str, Any]:
    with SILENT.task("", None) as task:
        return recall(models, tokenizer, questions, batch_sequences=batch_sequences, task=task)


def test_hits_are_counted_by_kind_length_and_depth(tokenizer: Any, questions: Any) -> None:
    row = ask({"student": Reader(tokenizer, 0.5), "teacher": Reader(tokenizer)}, tokenizer, questions)
    assert (row["teacher"]["hits"], row["teacher"]["samples"]) == (24, 24)
    assert row["student"]["hits"] == 12
    assert list(row["kinds"]) == ["niah_single_1", "niah_single_2", "niah_single_3"]
    for lengths in row["kinds"].values():
        assert list(lengths) == ["500", "700"]
        for tokens, cell in lengths.items():
            assert cell["student"]["share"] == 0.5
            cells = [(d["depth"], d["student"]["hits"], d["student"]["samples"]) for d in cell["depths"]]
            assert cells == [(0.1, 2, 2), (0.9, 0, 2)]
            assert int(tokens) - 12 < cell["prompt_tokens"][0] <= cell["prompt_tokens"][1] <= int(tokens)
    assert row["by_length"]["500"]["student"]["samples"] == 12
    assert row["student"]["low"] < 0.5 < row["student"]["high"]


def test_batches_of_unequal_prompts_change_nothing(tokenizer: Any, questions: Any) -> None:
    models = {"student": Reader(tokenizer, 0.6)}
    assert ask(models, tokenizer, questions) == ask(models, tokenizer, questions, batch_sequences=5)
    assert ask(models, tokenizer, questions)["teacher"] is None


def test_a_value_behind_a_long_preamble_is_no_hit(tokenizer: Any, questions: Any) -> None:
    row = ask({"student": Reader(tokenizer, prefix=" well, let me think about it, it was " * 3)}, tokenizer, questions)
    assert row["student"]["hits"] == 0


def test_a_neighbour_with_a_longer_value_lends_no_tokens(tokenizer: Any, questions: Any) -> None:
    long = questions[-1]
    prompt = long.prompt.replace(long.value, "4711")
    short = replace(long, value="4711", prompt=prompt)
    late = {"student": Reader(tokenizer, prefix=" well then ")}
    assert ask(late, tokenizer, [short])["student"]["hits"] == 0
    assert ask(late, tokenizer, [short, long], batch_sequences=2)["student"]["hits"] == 0
    assert ask({"student": Reader(tokenizer)}, tokenizer, [short, long], batch_sequences=2)["student"]["hits"] == 2


def test_what_follows_the_end_token_is_cut(tokenizer: Any) -> None:
    (answer,) = greedy(Reader(tokenizer), tokenizer, [prompt_ids(tokenizer, "It is: 12. So it is")], 9)
    assert answer == tokenizer(" 12")["input_ids"]


def test_the_budget_is_ten_tokens_or_what_the_value_needs(tokenizer: Any, questions: Any) -> None:
    for needle in questions:
        value_tokens = len(tokenizer(f" {needle.value}")["input_ids"])
        wanted = value_tokens + 2 if needle.kind == "niah_single_3" else max(NUMBER_TOKENS, value_tokens)
        assert answer_tokens(tokenizer, needle) == wanted


def test_greedy_equals_an_argmax_loop_without_cache_in_a_padded_batch(tokenizer: Any, teacher: Any) -> None:
    prompts = [prompt_ids(tokenizer, text) for text in ("the old king", "a quiet river and stone", "trees")]
    together = greedy(teacher, tokenizer, prompts, 6)
    for prompt, new in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                following = int(teacher(torch.tensor([tokens])).logits[0, -1].argmax())
            if following == 2:
                break
            tokens.append(following)
        assert new == tokens[len(prompt) :]


def test_a_prompt_loses_the_end_token_that_a_tokenizer_adds(tokenizer: Any) -> None:
    class Ending:
        eos_token_id, eos_token = 2, "</s>"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer(text)["input_ids"], 2]}

    assert prompt_ids(Ending(), "the king") == tokenizer("the king")["input_ids"]
