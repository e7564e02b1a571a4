"""Recall by task, length and depth: student and teacher on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridize.evaluation.asking import ask
from hybridize.evaluation.cells import Cell, pair_cell
from hybridize.evaluation.items import Item
from hybridize.progress import Task


def recall(
    models: dict[str, Any], tokenizer: Any, items: Sequence[Item], *, batch_tokens: int, task: Task
) -> dict[str, Any]:
    """Asks every model every question.

    Args:
        models: "student" and, where there is one, "teacher".

    Returns:
        What `pair_cell` says of everything; under "by_length" the same for each length; under "tasks" task -> length
        -> the same, with "prompt_tokens": [fewest, most] and "depths": [{"depth", ...}] where a task has them.
    """
    scores = {
        name: ask(model, tokenizer, items, batch_tokens=batch_tokens, task=task) for name, model in models.items()
    }
    return gather(items, scores)


def gather(items: Sequence[Item], scores: dict[str, list[float]]) -> dict[str, Any]:
    """The row of the probe from the scores of every item by model."""

    def cell(chosen: Sequence[int]) -> Cell:
        return pair_cell({name: [found[i] for i in chosen] for name, found in scores.items()})

    tasks: dict[str, Any] = {}
    for name, length in dict.fromkeys((item.task, item.group) for item in items):
        group = [i for i, item in enumerate(items) if (item.task, item.group) == (name, length)]
        lengths = [len(items[i].prompt) for i in group]
        depths = sorted({depth for i in group if (depth := items[i].depth) is not None})
        tasks.setdefault(name, {})[str(length)] = {
            **cell(group),
            "prompt_tokens": [min(lengths), max(lengths)],
            "depths": [{"depth": d, **cell([i for i in group if items[i].depth == d])} for d in depths],
        }
    by_length = {
        str(length): cell([i for i, item in enumerate(items) if item.group == length])
        for length in sorted({item.group for item in items})
    }
    return {**cell(range(len(items))), "by_length": by_length, "tasks": tasks}
