"""Prompts to be continued, and how a continuation is scored: what recall and reading are made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        task: the name that scores are gathered under.
        prompt: tokens, with the tokenizer's start token if it has one.
        answers: texts that the continuation must hold.
        answer_tokens: how many tokens the model may spend.
        group: length of the prompt that was asked for, in tokens; what else items are gathered by is a task's matter.
        depth: where in the prompt the answer stands, 0 to 1; None where it has no one place.
        needs: "all" gives the share of the answers that are found, "any" one point for any of them.
        targets: (position, token) pairs; where there are any, nothing is generated: the score is the share of the
            positions of the prompt after which the model finds that token likeliest. `answers` is then empty.
        evidence: token spans [start, end) of the prompt without which the question cannot be answered.
    """

    task: str
    prompt: tuple[int, ...]
    answers: tuple[str, ...]
    answer_tokens: int
    group: int
    depth: float | None = None
    needs: Literal["all", "any"] = "all"
    targets: tuple[tuple[int, int], ...] = ()
    evidence: tuple[tuple[int, int], ...] = ()


def score(item: Item, continuation: str) -> float:
    """How much of the answer a continuation holds, 0 to 1; case does not matter (RULER's `string_match_all`)."""
    text = _UNPRINTABLE.sub("\n", continuation).lower()
    found = [answer.lower() in text for answer in item.answers]
    return float(any(found)) if item.needs == "any" else sum(found) / len(found)
