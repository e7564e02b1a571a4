"""Greedy continuations by student and teacher, side by side."""

from __future__ import annotations

from typing import Any

from hybridize.evaluation.generation import greedy, prompt_ids
from hybridize.progress import Task
from hybridize.recipe.probes import SamplesProbe


def samples(models: dict[str, Any], tokenizer: Any, settings: SamplesProbe, *, task: Task) -> dict[str, Any]:
    """Continues every prompt with every model ("student" and, where there is one, "teacher").

    Returns:
        "samples": a list of {"prompt", "student", "teacher"}, and "new_tokens", the most that a continuation has.
    """
    rows = []
    for prompt in settings.prompts:
        row: dict[str, Any] = {"prompt": prompt, "student": None, "teacher": None}
        for name, model in models.items():
            tokens = greedy(model, tokenizer, [prompt_ids(tokenizer, prompt)], settings.new_tokens)[0]
            row[name] = tokenizer.decode(tokens, skip_special_tokens=True)
            task.advance()
        rows.append(row)
    return {"samples": rows, "new_tokens": settings.new_tokens}
