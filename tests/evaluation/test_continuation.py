from __future__ import annotations

from typing import Any

import pytest

from hybridize.evaluation.continuation import common_tokens, continuation
from hybridize.evaluation.generation import greedy
from hybridize.progress import SILENT
from tests.evaluation.scripted import Scripted


def run(models: dict[str, Any], tokenizer: Any, prompts: Any, new_tokens: int = 8, batch_tokens: int = 1000) -> Any:
    with SILENT.task("", None) as task:
        return continuation(models, tokenizer, prompts, new_tokens=new_tokens, batch_tokens=batch_tokens, task=task)


def test_tokens_in_common_end_at_the_first_difference() -> None:
    assert common_tokens([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert common_tokens([1, 2], [1, 2, 3]) == 2
    assert common_tokens([], [1]) == 0


def test_a_model_agrees_with_itself_to_the_end(teacher: Any, tokenizer: Any) -> None:
    prompts = [list(range(3, 20)), list(range(40, 50))]
    row = run({"student": teacher, "teacher": teacher}, tokenizer, prompts)
    assert (row["same_tokens"], row["median"], row["whole"]["share"]) == (8.0, 8.0, 1.0)
    assert row["curve"] == [{"tokens": n, "share": 1.0} for n in (1, 2, 4, 8)]
    assert (row["prompts"], row["prompt_tokens"], row["new_tokens"]) == (2, 17, 8)


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_the_mean_is_that_of_plain_comparison(teacher: Any, other: Any, tokenizer: Any, batch_tokens: int) -> None:
    prompts = [list(range(start, start + 9 + start % 4)) for start in range(3, 60, 5)]
    row = run({"student": other, "teacher": teacher}, tokenizer, prompts, batch_tokens=batch_tokens)
    same = []
    for prompt in prompts:
        (ours,), (theirs,) = (greedy(model, tokenizer, [prompt], 8) for model in (other, teacher))
        same.append(8 if ours == theirs else next(i for i in range(9) if ours[: i + 1] != theirs[: i + 1]))
    assert row["same_tokens"] == pytest.approx(sum(same) / len(same))
    assert [point["share"] for point in row["curve"]] == [
        pytest.approx(sum(n >= k for n in same) / len(same)) for k in (1, 2, 4, 8)
    ]


def test_an_end_that_both_write_is_agreement_to_the_end(tokenizer: Any) -> None:
    models = {"student": Scripted(tokenizer, lambda _: " so"), "teacher": Scripted(tokenizer, lambda _: " so")}
    assert run(models, tokenizer, [[5, 6, 7]])["whole"]["share"] == 1.0
    models["student"] = Scripted(tokenizer, lambda _: " so long")
    row = run(models, tokenizer, [[5, 6, 7]])
    assert row["whole"]["share"] == 0.0
    assert row["same_tokens"] == len(tokenizer(" so")["input_ids"])
