"""Multi-query associative recall (MQAR, arXiv 2312.04927): pairs of words, and later the first word of each again."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from hybridize.evaluation.items import Item
from hybridize.evaluation.tasks.pieces import Ids, Pieces
from hybridize.evaluation.tasks.question import Asked

TOKENS_PER_PAIR = 32
"""Tokens of the prompt for each pair: 64 pairs in 2048 tokens."""
MOST_PAIRS = 256
GAP_EXPONENT = 0.01
"""A gap g between pairs and query has probability in proportion to g ** (GAP_EXPONENT − 1), as in the paper."""
_LETTERS = 3


def associative_recall(pieces: Pieces, asked: Asked) -> Item:
    """Lines "key: value"; first all pairs, then every key once more with its value, among other pairs nobody asks for.

    Nothing is generated: a query is answered if after the second "key:" the model finds the value likeliest.
    """
    rng, room = asked.rng, asked.tokens - len(pieces.start)
    words = list(_words(pieces.tokenizer))
    colon, end = pieces.joined(":"), pieces.line_end
    line = 2 + len(colon) + len(end)
    pairs = min(MOST_PAIRS, max(1, asked.tokens // TOKENS_PER_PAIR), len(words) // 4)
    slots = room // line - pairs
    if pairs < 1 or slots < pairs:
        raise asked.no_room()
    rng.shuffle(words)
    keys, values, others = words[:pairs], words[pairs : 2 * pairs], words[2 * pairs :]
    lines = [*zip(keys, values, strict=True)]
    lines += [(rng.choice(others), rng.choice(others)) for _ in range(slots + 1)]  # one more for what is left over
    asked_in = {pairs + slot: pair for slot, pair in zip(_slots(slots, pairs, rng), lines[:pairs], strict=True)}
    body = [token for i, pair in enumerate(lines) for token in _line(asked_in.get(i, pair), colon, end)]
    start = len(pieces.start)
    return Item(
        asked.task,
        (*pieces.start, *body[:room]),
        (),
        0,
        asked.tokens,
        targets=tuple((start + i * line + len(colon), asked_in[i][1]) for i in sorted(asked_in)),
        evidence=tuple((start + i * line, start + (i + 1) * line) for i in range(pairs)),
    )


def _line(pair: tuple[int, int], colon: Ids, end: Ids) -> Ids:
    key, value = pair
    return (key, *colon, value, *end)


def _slots(count: int, wanted: int, rng: Any) -> list[int]:
    """Distinct slots, early ones likelier: weighted sampling without replacement by exponential keys."""
    scores = [(math.log(rng.random() or 5e-324) * (slot + 1) ** (1 - GAP_EXPONENT), slot) for slot in range(count)]
    return [slot for _, slot in sorted(scores, reverse=True)[:wanted]]


@lru_cache(maxsize=8)
def _words(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that are a word of lower-case letters after a blank; any ordinary tokens where there are few of them."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ordinary = [i for i, name in enumerate(names) if i not in special and name is not None]
    words = [i for i in ordinary if _is_word(names[i])]
    return tuple(words if len(words) >= 4 * MOST_PAIRS else ordinary)


def _is_word(token: str) -> bool:
    body = token[1:]
    return token[:1] in "Ġ▁" and len(body) >= _LETTERS and body.isascii() and body.isalpha() and body.islower()
