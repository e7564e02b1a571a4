"""Puts facts and the questions for them into running text."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hybridize.corpus.facts.drawing import Drawer, Thread
from hybridize.corpus.facts.fact import Fact, FactDocument, Mention, Placed
from hybridize.corpus.facts.filler import LONGEST_UNIT, Filler, Unit, count_tokens
from hybridize.errors import UsageError

FEWEST_FACTS, MOST_FACTS = 4, 24
FAR_TOKENS = 640
"""The nearest of most questions, counted from the last mention of the fact: more than windows and their blocks hold."""
_FAR_SHARE = 0.62
"""Of the document, where that is less."""
NEAR_TOKENS = 32
_NEAR_SHARE = 0.12
"""Of questions that come sooner than that."""
_TOKENS_PER_FACT = 90
"""Of the document, at least: its facts and questions must leave room for running text."""
_MENTIONS_SHARE = 0.5
"""Of the document that statements and questions may fill."""
FEWEST_TOKENS = 512
_SPARE_SHARE, _MOST_SPARE_SHARE = 0.03, 0.1
"""Of the document: what may be missing is little; that much is an error."""
_PATIENCE_TOKENS = 128
"""How long a sentence waits for the end of another one that it can follow."""
MONOTONOUS_SHARE = 0.2
"""Of documents, those that say the same again and again between their facts."""
REFRAIN_TOKENS = (16, 96)
_TRIES = 50
_INLINE_SHARE = 0.5
"""Of sentences, those that go into a paragraph."""
_PARAGRAPH = "\n\n"
_SENTENCE_ENDS = (".", "!", "?", ")")


class _Planned(NamedTuple):
    """A mention, the place that it should have, and the tokens of a paragraph of its own.

    It is `inline` where it may follow a sentence in its paragraph; what has lines never does.
    """

    place: float
    mention: Mention
    tokens: int
    inline: bool


def place_facts(
    filler: Sequence[str],
    tokenizer: Any,
    *,
    tokens: int,
    document_tokens: int,
    seed: int | str,
    length_jitter: float = 0.0,
) -> Iterator[FactDocument]:
    """The documents of `make_facts`, with the places of their facts."""
    if document_tokens < FEWEST_TOKENS:
        raise UsageError(
            f"Documents of {document_tokens} tokens are too short for facts.",
            hint=f"Ask for {FEWEST_TOKENS} tokens or more.",
        )
    if not 0 <= length_jitter < 1:
        raise UsageError(f"length_jitter is {length_jitter}.", hint="Give a share from 0 to below 1.")
    rng = random.Random(f"{seed}/facts")
    pieces = Filler(filler, tokenizer, rng)
    made = 0
    while made < tokens:
        length = max(FEWEST_TOKENS, round(document_tokens * (1 - length_jitter * rng.random())))
        document = _document(pieces, tokenizer, length, rng)
        yield document
        made += document.tokens


def _document(pieces: Filler, tokenizer: Any, length: int, rng: random.Random) -> FactDocument:
    planned = _plan(tokenizer, length, rng)
    room = length - sum(item.tokens for item in planned)
    refrain = pieces.piece(room, REFRAIN_TOKENS) if rng.random() < MONOTONOUS_SHARE else []
    running: list[Unit] = []
    while room > length * _SPARE_SHARE and (piece := refrain or pieces.piece(room)):
        running += piece
        room -= sum(unit.tokens for unit in piece)
        if sum(unit.tokens for unit in refrain) > room:
            refrain = []
    if room > length * _MOST_SPARE_SHARE:
        raise UsageError(
            f"The text has too few sentences and lines of at most {LONGEST_UNIT} characters.",
            hint="Give running text with full stops or line ends.",
        )
    return _join(running, planned)


def _plan(tokenizer: Any, length: int, rng: random.Random) -> list[_Planned]:
    """Mentions at the places that they should have, in tokens from the beginning; sorted. One asks, at least."""
    most = min(MOST_FACTS, max(FEWEST_FACTS, length // _TOKENS_PER_FACT))
    for _ in range(_TRIES):
        count = round(_log_uniform(FEWEST_FACTS, most, rng))
        placed = [place for thread in Drawer(rng).threads(count) for place in _places(thread, length, rng)]
        counts = count_tokens(tokenizer, [f"{_PARAGRAPH}{mention.text}" for _, mention in placed])
        planned = [_Planned(*pair, n, _is_inline(pair[1].text, rng)) for pair, n in zip(placed, counts, strict=True)]
        kept = _within(planned, length * _MENTIONS_SHARE)
        if any(item.mention.asks for item in kept):
            return sorted(kept, key=lambda item: item.place)
    raise UsageError(
        f"A document of {length} tokens has no room for facts and questions.", hint="Ask for longer documents."
    )


def _within(planned: Sequence[_Planned], room: float) -> list[_Planned]:
    """The mentions that fit into `room` tokens: statements first, and questions for facts that are stated."""
    kept: list[_Planned] = []
    stated: set[Fact] = set()
    for item in sorted(planned, key=lambda item: item.mention.asks):
        if item.tokens <= room and (not item.mention.asks or stated.issuperset(item.mention.facts)):
            kept.append(item)
            room -= item.tokens
            stated.update(item.mention.facts)
    return kept


def _places(thread: Thread, length: int, rng: random.Random) -> Iterator[tuple[float, Mention]]:
    """Statements anywhere, questions at log-uniform distances behind them; those that find no room are left out."""
    distance = _distance(length, rng) if thread.questions else 0
    room = max(0, length * 0.98 - distance)
    last = 0.0
    for statement in thread.statements:
        yield (place := rng.uniform(0, room)), statement
        last = max(last, place)
    for question in thread.questions:
        last += distance
        if last > length:
            return
        yield last, question
        distance = _distance(length, rng)


def _distance(length: int, rng: random.Random) -> float:
    far = min(FAR_TOKENS, length * _FAR_SHARE)
    if rng.random() < _NEAR_SHARE:
        return _log_uniform(NEAR_TOKENS, far, rng)
    return _log_uniform(far, length * 0.95, rng)


def _log_uniform(low: float, high: float, rng: random.Random) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _is_inline(text: str, rng: random.Random) -> bool:
    return "\n" not in text and text.endswith(_SENTENCE_ENDS) and rng.random() < _INLINE_SHARE


def _join(running: Sequence[Unit], planned: Sequence[_Planned]) -> FactDocument:
    """One text. A mention stands at the first boundary from its place on that suits it, none overtakes another."""
    waiting = deque(planned)
    text: list[str] = []
    placed: list[Placed] = []
    characters = tokens = 0

    def add(piece: str, count: int) -> None:
        nonlocal characters, tokens
        text.append(piece)
        characters += len(piece)
        tokens += count

    def mention(item: _Planned, space: str) -> None:
        placed.append(Placed(item.mention, characters + len(space), tokens))
        add(f"{space}{item.mention.text}", item.tokens)

    for unit in running:
        while waiting and waiting[0].place <= tokens and (space := _space(waiting[0], text, unit.text, tokens)):
            mention(waiting.popleft(), space)
        add(unit.text if text else unit.text.lstrip("\n"), unit.tokens)
    for item in waiting:
        mention(item, _space(item, text, _PARAGRAPH, math.inf))
    return FactDocument("".join(text), tokens, tuple(placed))


def _space(item: _Planned, before: Sequence[str], after: str, tokens: float) -> str:
    """What parts a mention from the text before it; "" where it must wait for a better place."""
    if item.inline and before and before[-1].endswith(_SENTENCE_ENDS):
        return " "
    can_stand_alone = bool(before) and after.startswith("\n")
    return _PARAGRAPH if can_stand_alone and (not item.inline or tokens > item.place + _PATIENCE_TOKENS) else ""
