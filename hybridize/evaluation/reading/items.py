"""The items of the reading probe, from its sources or from the metadata of the installed packages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hybridize.errors import CheckpointError
from hybridize.evaluation.generation import prompt_ids
from hybridize.evaluation.items import Item
from hybridize.evaluation.reading.packages import SOURCE, package_passages
from hybridize.evaluation.reading.passage import Passage
from hybridize.evaluation.reading.prompt import make_item
from hybridize.evaluation.reading.rows import FORMS, passages
from hybridize.evaluation.reading.squad import squad_passages
from hybridize.recipe.documents import read_rows
from hybridize.recipe.probes import ReadingProbe
from hybridize.recipe.sources import TextSource

MOST_ROWS = 100_000
"""Read of a source before questions are drawn from them: a data set that is streamed may have no end."""


def make_reading_items(
    probe: ReadingProbe, tokenizer: Any, base: Path, *, seed: int, offline: bool
) -> tuple[list[Item], list[str]]:
    """The items of every source, `task` being its name, and their questions as the report shows them.

    The same arguments give the same items. Questions whose answer does not stand in their document, or not in as
    much of it as a prompt holds, are left out.

    Raises:
        RecipeError: nothing matches a path, or a question alone is longer than a prompt may be.
        CheckpointError: a row that cannot be read as a question, or a source without a question.
    """
    items: list[Item] = []
    questions: list[str] = []
    for number, source in enumerate(probe.sources or (None,)):
        rng = random.Random(f"{seed}/reading/{number}")
        if source is None:
            found = package_passages(probe.max_tokens, lambda text: len(prompt_ids(tokenizer, text)), rng)
        else:
            found = _drawn(source, base, rng, offline)
        before = len(items)
        for passage in found:
            if len(items) - before == probe.max_questions:
                break
            item = make_item(passage, tokenizer, probe.max_tokens, rng)
            if item is not None:
                items.append(item)
                questions.append(passage.question)
        if len(items) == before:
            raise CheckpointError(
                f"Not one question has its answer in a text of {probe.max_tokens} tokens.",
                where=SOURCE if source is None else source.path,
                hint=f"Give rows whose answers stand in their texts, or a larger max_tokens. {FORMS}",
            )
    return items, questions


def _drawn(source: TextSource, base: Path, rng: random.Random, offline: bool) -> Iterator[Passage]:
    """The questions of a source, in a drawn order."""
    if source.format is None and source.path.endswith(".json"):
        found = list(islice(squad_passages(source, base), MOST_ROWS))
    else:
        found = list(passages(islice(read_rows(source, base, offline=offline), MOST_ROWS)))
    rng.shuffle(found)
    yield from found
