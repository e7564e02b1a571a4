"""Student and teacher on the same questions about documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridize.evaluation.asking import answers
from hybridize.evaluation.cells import pair_cell
from hybridize.evaluation.items import Item, score
from hybridize.progress import Task

EXAMPLES = 3
"""Shown of each source."""


def reading(
    models: dict[str, Any],
    tokenizer: Any,
    items: Sequence[Item],
    questions: Sequence[str],
    *,
    batch_tokens: int,
    task: Task,
) -> dict[str, Any]:
    """Asks every model every question; a hit is an answer anywhere in the continuation, whatever the case.

    Args:
        models: "student" and, where there is one, "teacher".
        questions: of the items, as the report shows them.

    Returns:
        What `pair_cell` says of everything; under "sources" the same for each source, with "questions" (how many),
        "prompt_tokens": [fewest, most] and "examples".
    """
    texts = {
        name: answers(model, tokenizer, items, batch_tokens=batch_tokens, task=task) for name, model in models.items()
    }
    scores = {name: [score(item, text) for item, text in zip(items, made, strict=True)] for name, made in texts.items()}
    sources: dict[str, Any] = {}
    for name in dict.fromkeys(item.task for item in items):
        group = [i for i, item in enumerate(items) if item.task == name]
        lengths = [len(items[i].prompt) for i in group]
        sources[name] = {
            **pair_cell({model: [found[i] for i in group] for model, found in scores.items()}),
            "questions": len(group),
            "prompt_tokens": [min(lengths), max(lengths)],
            "examples": [
                {
                    "question": questions[i],
                    "answers": list(items[i].answers),
                    **{model: texts[model][i] if model in texts else None for model in ("student", "teacher")},
                }
                for i in group[:EXAMPLES]
            ],
        }
    return {**pair_cell(scores), "sources": sources}
