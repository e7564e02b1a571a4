"""A document with a question about it, before it becomes a prompt of the model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """One question.

    Attributes:
        source: name that scores are gathered under.
        document: the text that the answer is read from.
        cue: what follows the document, to be continued.
        answers: alternatives, any of which the continuation must hold.
        kept: characters [start, end) of the document that must stay when it is cut.
        answer: characters [start, end) of the document where the answer stands, within `kept`.
        question: the cue as the report shows it.
    """

    source: str
    document: str
    cue: str
    answers: tuple[str, ...]
    kept: tuple[int, int]
    answer: tuple[int, int]
    question: str


def place_of(document: str, answers: Sequence[str], start: int | None = None) -> tuple[int, int] | None:
    """Characters [start, end) of the first answer that stands in the document, whatever the case; None: none does.

    Args:
        start: where the first answer is said to stand.
    """
    if start is not None and document[start : start + len(answers[0])].lower() == answers[0].lower():
        return start, start + len(answers[0])
    # Lower case of some letters is longer, which would shift the places; such documents are searched as they are.
    lower = document.lower()
    folded = len(lower) == len(document)
    for answer in answers:
        found = lower.find(answer.lower()) if folded else document.find(answer)
        if found >= 0:
            return found, found + len(answer)
    return None
