"""Prompts of at most so many tokens: a document cut around its answer, and the cue."""

from __future__ import annotations

import random
from typing import Any

from hybridize.errors import RecipeError
from hybridize.evaluation.generation import prompt_ids
from hybridize.evaluation.items import Item
from hybridize.evaluation.reading.passage import Passage

SPARE_TOKENS = 8
"""More than the longest answer needs: a word before it, quotation marks."""


def make_item(passage: Passage, tokenizer: Any, max_tokens: int, rng: random.Random) -> Item | None:
    """The passage as an item of at most `max_tokens` prompt tokens; None where what must stay is longer than that.

    A longer document loses tokens on both sides; how many of them on the left is drawn.

    Args:
        tokenizer: a fast one, which tells the characters of its tokens.

    Raises:
        RecipeError: the question alone is longer than `max_tokens`.
    """
    cue_tokens = len(prompt_ids(tokenizer, passage.cue))
    if cue_tokens >= max_tokens:
        hint = f"Set it to more than {cue_tokens}."
        raise RecipeError("The question alone is longer than max_tokens.", where="evaluate.reading", hint=hint)
    share = rng.random()
    room = max_tokens - cue_tokens
    while True:
        span = _cut(passage, tokenizer, room, share)
        if span is None:
            return None
        text = passage.document[span[0] : span[1]] + passage.cue
        prompt = prompt_ids(tokenizer, text)
        if len(prompt) <= max_tokens:
            break
        # Where document and cue meet, and at the cut, tokens may differ from those of the whole document.
        room -= len(prompt) - max_tokens
    evidence = _tokens_of(text, tokenizer, passage.answer[0] - span[0], passage.answer[1] - span[0])
    needed = max(len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) for answer in passage.answers)
    return Item(
        task=passage.source,
        prompt=tuple(prompt),
        answers=passage.answers,
        answer_tokens=needed + SPARE_TOKENS,
        group=max_tokens,
        depth=evidence[0] / len(prompt),
        needs="any",
        evidence=(evidence,),
    )


def _cut(passage: Passage, tokenizer: Any, room: int, share: float) -> tuple[int, int] | None:
    """Characters of the document that `room` tokens hold; `share` of what goes beyond what must stay is on the left."""
    offsets = _offsets(tokenizer, passage.document, special=False)
    if len(offsets) <= room:
        return 0, len(passage.document)
    inside = [i for i, (start, end) in enumerate(offsets) if end > passage.kept[0] and start < passage.kept[1]]
    first, last = inside[0], inside[-1] + 1
    spare = room - (last - first)
    if spare < 0:
        return None
    left = min(max(round(share * spare), spare - (len(offsets) - last)), first)
    start = first - left
    stop = min(start + room, len(offsets))
    return min(offsets[start][0], passage.kept[0]), max(offsets[stop - 1][1], passage.kept[1])


def _tokens_of(text: str, tokenizer: Any, start: int, end: int) -> tuple[int, int]:
    offsets = _offsets(tokenizer, text, special=True)
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < end and b > a]
    return inside[0], inside[-1] + 1


def _offsets(tokenizer: Any, text: str, *, special: bool) -> list[tuple[int, int]]:
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
    return [(start, end) for start, end in found]
