"""RULER's aggregation tasks: the words that come most often, in a numbered list and in a coded text."""

from __future__ import annotations

import math
import random
import string
from typing import NamedTuple

from hybridize.evaluation.items import Item
from hybridize.evaluation.tasks.needles import NUMBER_TOKENS
from hybridize.evaluation.tasks.pieces import Ids, Pieces
from hybridize.evaluation.tasks.question import Asked
from hybridize.evaluation.tasks.vocabulary import compounds, plain_words

LIST_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
LIST_QUESTION = (
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
CODE_HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words."
)
CODE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
NUM_COMMON = 10
LONG_TOKENS = 4096
"""From here on words are repeated more often."""
CODED_LETTERS = 6
TOKENS_PER_CODED_WORD = 50
"""Tokens of the prompt for each word of the coded vocabulary."""
DOTS = "..."
_ZETA_2 = math.pi**2 / 6
_JOINING_TOKENS = 3


class Repeats(NamedTuple):
    """How often a common and an uncommon word stand in the list, and the same of the example, with its words."""

    common: int
    uncommon: int
    example_common: int
    example_uncommon: int
    example_words: int


SHORT = Repeats(6, 1, 3, 1, 20)
LONG = Repeats(30, 3, 10, 3, 40)


def common_words(pieces: Pieces, asked: Asked) -> Item:
    """Common words extraction: ten words that stand in a list more often than all others, behind a solved example."""
    seed = asked.rng.getrandbits(64)
    # A list of the longer kind does not fit where a tokenizer spends many tokens on a word.
    for repeats in (LONG, SHORT) if asked.tokens >= LONG_TOKENS else (SHORT,):
        item = _common_words(pieces, asked, repeats, random.Random(seed))
        if item is not None:
            return item
    raise asked.no_room()


def _common_words(pieces: Pieces, asked: Asked, repeats: Repeats, rng: random.Random) -> Item | None:
    words = _vocabulary(pieces, asked.tokens, repeats, rng)
    example, words = words[: repeats.example_words], words[repeats.example_words :]
    head = pieces.opening(_example(example, repeats, rng) + "\n" + LIST_HEAD)
    tail = (*pieces.line_end, *pieces.joined(LIST_QUESTION))
    room = asked.tokens - len(pieces.start) - len(head) - len(tail)
    common, uncommon = words[:NUM_COMMON], words[NUM_COMMON:]
    context = _longest_list(pieces, room, common * repeats.common, uncommon, repeats.uncommon, rng)
    if context is None:
        return None
    answers = tuple(common)
    budget = NUMBER_TOKENS + len(pieces.spaced(_numbered(common)))
    return Item(asked.task, (*pieces.start, *head, *context, *tail), answers, budget, asked.tokens)


def frequent_words(pieces: Pieces, asked: Asked) -> Item:
    """Frequent words extraction: coded words with Zipf frequencies k⁻², the first of which are dots; the next three."""
    rng = asked.rng
    size = max(asked.tokens // TOKENS_PER_CODED_WORD, 5)
    words: dict[str, None] = {}
    while len(words) < size:
        words["".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
    vocabulary = [DOTS, *list(words)[1:]]
    head = pieces.opening(CODE_HEAD)
    tail = (*pieces.line_end, *pieces.joined(CODE_QUESTION))
    room = asked.tokens - len(pieces.start) - len(head) - len(tail)
    context = _longest_code(pieces, room, vocabulary, rng)
    if context is None:
        raise asked.no_room()
    answers = tuple(vocabulary[1:4])
    budget = NUMBER_TOKENS + sum(len(pieces.spaced(word)) + _JOINING_TOKENS for word in answers)
    return Item(asked.task, (*pieces.start, *head, *context, *tail), answers, budget, asked.tokens)


def _vocabulary(pieces: Pieces, tokens: int, repeats: Repeats, rng: random.Random) -> list[str]:
    """Distinct words, drawn; compounds where plain ones are too few for a list that fills the prompt."""
    entry = len(pieces.spaced("100. tree"))
    wanted = repeats.example_words + NUM_COMMON + tokens // (entry * repeats.uncommon)
    words = plain_words()
    if len(words) < wanted:
        words = compounds()
    return rng.sample(words, min(wanted, len(words)))


def _example(words: list[str], repeats: Repeats, rng: random.Random) -> str:
    common = words[:NUM_COMMON]
    entries = common * repeats.example_common + words[NUM_COMMON:] * repeats.example_uncommon
    rng.shuffle(entries)
    return f"{LIST_HEAD}{_numbered(entries)}\n{LIST_QUESTION} {_numbered(common)}"


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def _longest_list(
    pieces: Pieces, room: int, common: list[str], uncommon: list[str], uncommon_repeats: int, rng: random.Random
) -> Ids | None:
    """As many uncommon words as fit, and then as much of further ones as fills the room."""
    entries = list(common)
    length = sum(len(_entry(pieces, i, word)) for i, word in enumerate(entries))
    if length > room:
        return None
    taken = 0
    for word in uncommon:
        longer = length + sum(len(_entry(pieces, len(entries) + i, word)) for i in range(uncommon_repeats))
        if longer > room:
            break
        entries += [word] * uncommon_repeats
        length, taken = longer, taken + 1
    rng.shuffle(entries)
    further = uncommon[taken:] or uncommon
    ids = [token for i, word in enumerate(entries) for token in _entry(pieces, i, word)]
    for i in range(room - len(ids)):  # an entry is a token at least
        ids += _entry(pieces, len(entries) + i, further[i % len(further)])
        if len(ids) >= room:
            break
    return tuple(ids[:room])


def _entry(pieces: Pieces, index: int, word: str) -> Ids:
    """One entry of the list. Its length does not depend on what stands before it, so that a shuffle keeps the sum."""
    number = pieces.joined("1.") if index == 0 else pieces.spaced(f"{index + 1}.")
    return (*number, *pieces.spaced(word))


def _longest_code(pieces: Pieces, room: int, vocabulary: list[str], rng: random.Random) -> Ids | None:
    """The text of most words that fits, and dots to its end."""

    def words_of(total: int) -> list[str]:
        counts = (int(total / (rank * rank) / _ZETA_2) for rank in range(1, len(vocabulary) + 1))
        return [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]

    def length_of(total: int) -> int:
        return sum(len(pieces.spaced(word)) for word in words_of(total))

    low, high = 0, max(room, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if length_of(middle) <= room:
            low = middle
        else:
            high = middle - 1
    words = words_of(low)
    # The last of the three answers comes more often than the first word that is none.
    if not words.count(vocabulary[3]) > words.count(vocabulary[4]) > 0:
        return None
    rng.shuffle(words)
    ids = [token for word in words for token in pieces.spaced(word)]
    while len(ids) < room:
        ids += pieces.spaced(DOTS)
    return tuple(ids[:room])
