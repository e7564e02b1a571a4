"""The tasks of the recall probe: what each is, and where it comes from, stands in README.md beside this file."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Protocol

from hybridize.errors import CheckpointError
from hybridize.evaluation.items import Item
from hybridize.evaluation.tasks.associative import associative_recall
from hybridize.evaluation.tasks.needles import NEEDLES, needle
from hybridize.evaluation.tasks.pieces import Pieces
from hybridize.evaluation.tasks.question import Asked
from hybridize.evaluation.tasks.variables import variable_tracking
from hybridize.evaluation.tasks.words import common_words, frequent_words

OTHERS: dict[str, Callable[[Pieces, Asked], Item]] = {
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "associative_recall": associative_recall,
}

PROSE_TASKS = frozenset(name for name, spec in NEEDLES.items() if spec.haystack == "prose")
"""Those that hide needles in prose."""


class Grid(Protocol):
    """Which questions are asked: settings of a probe."""

    @property
    def tasks(self) -> Sequence[str]: ...
    @property
    def lengths(self) -> Sequence[int]: ...
    @property
    def depths(self) -> Sequence[float]: ...
    @property
    def samples(self) -> int: ...


def make_items(settings: Grid, tokenizer: Any, prose: Sequence[str], *, seed: int) -> list[Item]:
    """Every question of the grid, in the order task, length, depth, sample.

    A question follows from its place in the grid, the seed, the tokenizer and the prose, whatever else is asked. Its
    prompt has exactly as many tokens as `lengths` says.

    Args:
        tokenizer: any; its start token, if it has one, begins every prompt and counts.
        prose: texts that haystacks are made of, in any order.

    Raises:
        UsageError: a length has no room for a question.
        CheckpointError: a task hides its needle in prose, and there is none.
    """
    wanting = [name for name in settings.tasks if name in PROSE_TASKS]
    if wanting and not any(text.strip() for text in prose):
        raise CheckpointError(
            f"{wanting[0]} hides its needle in held-out prose, and there is none.",
            where="data.held_out",
            hint="Give held-out documents, or leave out the tasks that need them (evaluate.recall.tasks).",
        )
    pieces = Pieces(tokenizer, prose)
    items = []
    for task, tokens, depth, sample in product(
        settings.tasks, settings.lengths, settings.depths, range(settings.samples)
    ):
        rng = random.Random(f"{seed}/{task}/{tokens}/{depth}/{sample}")
        asked = Asked(task, tokens, depth, rng)
        items.append(needle(pieces, asked) if task in NEEDLES else OTHERS[task](pieces, asked))
    return items
