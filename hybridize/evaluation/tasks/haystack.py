"""A context that is filled with hay to the last token, and what is hidden in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from hybridize.evaluation.tasks.pieces import Ids, Pieces

_SLACK_TOKENS = 16
"""Hay beyond what is needed, before the cut: a piece may be shorter where it begins the context."""

Span = tuple[int, int]


class Context(NamedTuple):
    """Tokens of a context, and where each hidden text stands in them (in the order in which it was given)."""

    ids: Ids
    spans: list[Span]


class _Element(NamedTuple):
    text: str
    hidden: int | None
    """Number of the hidden text; None for hay, which may be cut."""


def fill(
    pieces: Pieces, room: int, hay: Iterator[str], hidden: Sequence[tuple[float, str]], *, lines: bool
) -> Context | None:
    """A context of exactly `room` tokens, which ends with a line end.

    Args:
        hay: sentences or lines without end.
        hidden: (depth, text): each stands at the boundary between two pieces of hay that is nearest to its depth; at
            one boundary, in the order given.
        lines: every piece is a line; else blanks stand between them.

    Returns:
        None if there is no room for the hidden texts and any hay.
    """
    needed = room - len(pieces.line_end) - sum(_most_tokens(pieces, text, lines) for _, text in hidden)
    if needed < 1:
        return None
    texts: list[str] = []
    ends = [0]
    while ends[-1] < needed + _SLACK_TOKENS:
        texts.append(text := next(hay))
        begins = len(texts) == 1
        tokens = _most_tokens(pieces, text, lines) if begins else len(_piece(pieces, text, lines, first=False))
        ends.append(ends[-1] + tokens)
    boundaries = [n for n in ends if n <= needed]
    places = [min(range(len(boundaries)), key=lambda i: abs(boundaries[i] - depth * needed)) for depth, _ in hidden]
    elements: list[_Element] = []
    for number, text in enumerate(texts):
        elements += [_Element(hidden[i][1], i) for i, place in enumerate(places) if place == number]
        elements.append(_Element(text, None))
    return _cut(pieces, room, elements, lines)


def _cut(pieces: Pieces, room: int, elements: Sequence[_Element], lines: bool) -> Context:
    """The elements side by side, hay cut off at the end so that they take `room` tokens."""
    tokens = [_piece(pieces, e.text, lines, first=i == 0) for i, e in enumerate(elements)]
    close = () if lines else pieces.line_end
    excess = sum(map(len, tokens)) + len(close) - room
    for i in reversed(range(len(elements))):
        if excess == 0:
            break
        if elements[i].hidden is None:
            kept = max(0, len(tokens[i]) - excess)
            excess -= len(tokens[i]) - kept
            tokens[i] = tokens[i][:kept]
            if lines and kept >= len(pieces.line_end):  # the line end was cut off with the rest
                tokens[i] = (*tokens[i][: kept - len(pieces.line_end)], *pieces.line_end)
    starts = [0, *accumulate(map(len, tokens))]
    spans = {e.hidden: (starts[i], starts[i + 1]) for i, e in enumerate(elements) if e.hidden is not None}
    ids = tuple(token for part in tokens for token in part)
    return Context((*ids, *close), [spans[i] for i in sorted(spans)])


def _piece(pieces: Pieces, text: str, lines: bool, *, first: bool) -> Ids:
    if lines:
        return pieces.joined(f"{text}\n")
    return pieces.joined(text) if first else pieces.spaced(text)


def _most_tokens(pieces: Pieces, text: str, lines: bool) -> int:
    """Of a piece of which it is not known yet whether it begins the context, so that none before a needle is cut."""
    return max(len(_piece(pieces, text, lines, first=first)) for first in (False, True))
