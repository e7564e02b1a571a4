"""Recall of a single needle, by kind, length and depth: student and teacher on the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, product
from typing import Any

from hybridize.evaluation.generation import greedy, prompt_ids
from hybridize.evaluation.needles import KINDS, Needle, make_needle
from hybridize.evaluation.statistics import wilson_interval
from hybridize.progress import Task
from hybridize.recipe.probes import RecallProbe

NUMBER_TOKENS = 10
"""Tokens that an answer may take; more where the tokenizer needs more for the value itself."""


def make_questions(settings: RecallProbe, tokenizer: Any, prose: Sequence[str], *, seed: int) -> list[Needle]:
    """Every question of the probe, in the order kind, length, depth, sample."""

    def count(text: str) -> int:
        return len(prompt_ids(tokenizer, text))

    grid = product(settings.kinds, settings.lengths, settings.depths, range(settings.samples))
    return [
        make_needle(kind, tokens, depth, sample, seed=seed, prose=prose, count=count)
        for kind, tokens, depth, sample in grid
    ]


def recall(
    models: dict[str, Any], tokenizer: Any, questions: Sequence[Needle], *, batch_sequences: int, task: Task
) -> dict[str, Any]:
    """Asks every model every question; a hit is the value anywhere in the continuation.

    Args:
        models: "student" and, where there is one, "teacher".

    Returns:
        Under "student" and "teacher" hits over everything; under "by_length" the same for each length; under "kinds" a
        dictionary kind -> length -> {"student", "teacher", "prompt_tokens": [fewest, most], "depths": [{"depth",
        "student", "teacher"}]}. A cell is {"hits", "samples", "share", "low", "high"}, the last two Wilson's 95 %
        interval.
    """
    hits = {name: _ask(model, tokenizer, questions, batch_sequences, task) for name, model in models.items()}

    def cell(chosen: Sequence[int]) -> dict[str, Any]:
        cells: dict[str, Any] = dict.fromkeys(("student", "teacher"))
        return cells | {name: _share([found[i] for i in chosen]) for name, found in hits.items()}

    kinds: dict[str, Any] = {}
    for kind, tokens in dict.fromkeys((needle.kind, needle.tokens) for needle in questions):
        group = [i for i, needle in enumerate(questions) if (needle.kind, needle.tokens) == (kind, tokens)]
        lengths = [questions[i].prompt_tokens for i in group]
        depths = sorted({questions[i].depth for i in group})
        kinds.setdefault(kind, {})[str(tokens)] = {
            **cell(group),
            "prompt_tokens": [min(lengths), max(lengths)],
            "depths": [{"depth": d, **cell([i for i in group if questions[i].depth == d])} for d in depths],
        }
    by_length = {
        str(tokens): cell([i for i, needle in enumerate(questions) if needle.tokens == tokens])
        for tokens in sorted({needle.tokens for needle in questions})
    }
    return {**cell(range(len(questions))), "by_length": by_length, "kinds": kinds}


def answer_tokens(tokenizer: Any, needle: Needle) -> int:
    """How many tokens the model may spend on its answer."""
    value = len(tokenizer(f" {needle.value}", add_special_tokens=False)["input_ids"])
    if KINDS[needle.kind].thing == "number":
        return max(NUMBER_TOKENS, value)
    return value + 2


def _ask(model: Any, tokenizer: Any, questions: Sequence[Needle], batch_sequences: int, task: Task) -> list[bool]:
    found = []
    for batch in _batches(questions, batch_sequences):
        prompts = [prompt_ids(tokenizer, needle.prompt) for needle in batch]
        budgets = [answer_tokens(tokenizer, needle) for needle in batch]
        answers = greedy(model, tokenizer, prompts, max(budgets))
        for needle, budget, answer in zip(batch, budgets, answers, strict=True):
            found.append(needle.value in tokenizer.decode(answer[:budget], skip_special_tokens=True))
        task.advance(len(batch), found=f"{sum(found)}/{len(found)}")
    return found


def _batches(questions: Sequence[Needle], size: int) -> Iterator[list[Needle]]:
    """Questions of one kind and length together: their prompts differ by a few tokens of padding."""
    for _, run in groupby(questions, key=lambda needle: (needle.kind, needle.tokens)):
        group = list(run)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(hits), len(hits))
    return {"hits": sum(hits), "samples": len(hits), "share": sum(hits) / len(hits), "low": low, "high": high}
