"""How long student and teacher write the same: greedy continuations of the same prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hybridize.evaluation.batches import batches_by_tokens
from hybridize.evaluation.cells import share_cell
from hybridize.evaluation.generation import greedy
from hybridize.evaluation.statistics import clustered_mean
from hybridize.progress import Task

Row = dict[str, Any]


def continuation(
    models: dict[str, Any],
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_tokens: int,
    task: Task,
) -> Row:
    """Continues every prompt with both models and counts the tokens until they part.

    One differing token changes all that follows, so this is stricter than agreement at every position, and nearer to
    what a reader sees. A continuation that both end at the same token counts as the same to its end.

    Returns:
        "same_tokens" (mean, with `_se`) and "median"; "whole": the share of prompts without any difference, a cell;
        "curve": for a growing number of tokens the share of prompts still the same; and the sizes.
    """
    made = {
        name: _continued(model, tokenizer, prompts, new_tokens, batch_tokens, task) for name, model in models.items()
    }
    pairs = list(zip(made["student"], made["teacher"], strict=True))
    same = [new_tokens if ours == theirs else common_tokens(ours, theirs) for ours, theirs in pairs]
    mean = clustered_mean([float(n) for n in same], [1] * len(same))
    counts = sorted({1 << n for n in range(new_tokens.bit_length()) if 1 << n <= new_tokens} | {new_tokens})
    return {
        "prompts": len(prompts),
        "prompt_tokens": max(len(prompt) for prompt in prompts),
        "new_tokens": new_tokens,
        "same_tokens": mean.value,
        "same_tokens_se": mean.standard_error,
        "median": float(statistics.median(same)),
        "whole": share_cell([float(n == new_tokens) for n in same]),
        "curve": [{"tokens": n, "share": sum(s >= n for s in same) / len(same)} for n in counts],
    }


def common_tokens(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return min(len(ours), len(theirs))


def _continued(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, batch_tokens: int, task: Task
) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in prompts]
    for batch in batches_by_tokens(prompts, batch_tokens, lambda prompt: len(prompt) + new_tokens):
        for i, tokens in zip(batch, greedy(model, tokenizer, [prompts[i] for i in batch], new_tokens), strict=True):
            made[i] = tokens
        task.advance(len(batch))
    return made
