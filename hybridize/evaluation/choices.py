"""Multiple choice: the answer that a model finds likeliest, for its length.

As `acc_bytes` of lm-evaluation-harness: the log-likelihood of " answer" after the question, over its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridize.errors import NumbersError
from hybridize.evaluation.batches import batches_by_tokens
from hybridize.evaluation.cells import pair_cell, share_cell
from hybridize.evaluation.generation import prompt_ids
from hybridize.evaluation.questions import Question, read_questions
from hybridize.progress import Task

__all__ = ["Question", "choices", "read_questions"]

Row = dict[str, Any]


class _Asked(NamedTuple):
    """One answer behind its question: all tokens, and how many of them are the answer's."""

    tokens: list[int]
    answer_tokens: int


def choices(
    models: dict[str, Any], tokenizer: Any, questions: Sequence[Question], *, batch_tokens: int, task: Task
) -> Row:
    """Lets every model choose.

    Args:
        models: "student" and, where there is one, "teacher".
        batch_tokens: tokens that go through a model at once, padding included.
        task: advances by one for each question and model.

    Returns:
        What `pair_cell` says of all; under "tasks" the same for each task, with "questions", "chance", the share that
        guessing finds, and "same", how often student and teacher choose alike (a cell; None without a teacher).
    """
    chosen = {
        name: choose(model, tokenizer, questions, batch_tokens=batch_tokens, task=task)
        for name, model in models.items()
    }
    right = {
        name: [float(choice == question.answer) for choice, question in zip(made, questions, strict=True)]
        for name, made in chosen.items()
    }
    tasks: Row = {}
    for name in dict.fromkeys(question.task for question in questions):
        group = [i for i, question in enumerate(questions) if question.task == name]
        same = None
        if "teacher" in chosen:
            same = share_cell([float(chosen["student"][i] == chosen["teacher"][i]) for i in group])
        tasks[name] = {
            **pair_cell({model: [found[i] for i in group] for model, found in right.items()}),
            "questions": len(group),
            "chance": sum(1 / len(questions[i].choices) for i in group) / len(group),
            "same": same,
        }
    return {**pair_cell(right), "tasks": tasks}


def choose(model: Any, tokenizer: Any, questions: Sequence[Question], *, batch_tokens: int, task: Task) -> list[int]:
    """The number of the likeliest answer to each question; of equals the first."""
    places = [(i, choice) for i, question in enumerate(questions) for choice in question.choices]
    asked = [_asked(tokenizer, questions[i].prompt, choice) for i, choice in places]
    scores = [0.0] * len(asked)
    with torch.inference_mode():
        for batch in batches_by_tokens(asked, batch_tokens, lambda one: len(one.tokens)):
            found = log_likelihoods(model, tokenizer, [asked[n] for n in batch])
            for n, value in zip(batch, found, strict=True):
                scores[n] = value / max(1, len(places[n][1].encode()))
            task.advance(sum(1 / len(questions[places[n][0]].choices) for n in batch))
    made: list[list[float]] = [[] for _ in questions]
    for (i, _), value in zip(places, scores, strict=True):
        made[i].append(value)
    return [values.index(max(values)) for values in made]


def log_likelihoods(model: Any, tokenizer: Any, asked: Sequence[_Asked]) -> list[float]:
    """The summed log-probability of each answer's tokens, in nats, after one pass over a batch padded on the right.

    Raises:
        NumbersError: the model's logits are not finite.
    """
    longest = max(len(one.tokens) for one in asked)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    tokens = torch.tensor([one.tokens + [pad] * (longest - len(one.tokens)) for one in asked], device=model.device)
    lengths = torch.tensor([len(one.tokens) for one in asked], device=model.device)
    mask = None
    if any(len(one.tokens) < longest for one in asked):
        mask = (torch.arange(longest, device=model.device) < lengths[:, None]).long()
    hidden = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    # The head only where an answer's token is foretold.
    rows = [row for row, one in enumerate(asked) for _ in range(one.answer_tokens)]
    before = [len(one.tokens) - one.answer_tokens - 1 + n for one in asked for n in range(one.answer_tokens)]
    log_p = torch.log_softmax(model.lm_head(hidden[rows, before]).float(), dim=-1)
    wanted = tokens[rows, [position + 1 for position in before]]
    values: Tensor = log_p.gather(-1, wanted[:, None]).squeeze(-1).double().cpu()
    if not torch.isfinite(values).all():
        raise NumbersError(
            "The logits are not finite.",
            where=f"{type(model).__name__} on multiple choice",
            hint="Run `hybridize verify` on the model; if its weights are finite, try evaluate.precision: float32.",
        )
    parts = torch.split(values, [one.answer_tokens for one in asked])
    return [float(part.sum()) for part in parts]


def _asked(tokenizer: Any, prompt: str, choice: str) -> _Asked:
    """Question and answer tokenised together where the question's own tokens stay as they are, else side by side."""
    head = prompt_ids(tokenizer, prompt)
    whole = prompt_ids(tokenizer, f"{prompt} {choice}")
    if whole[: len(head)] != head or len(whole) == len(head):
        whole = head + list(tokenizer(f" {choice}", add_special_tokens=False)["input_ids"])
    return _Asked(whole, len(whole) - len(head))
