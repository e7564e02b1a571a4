"""Needles in haystacks: the prompts of the recall probe.

After RULER's single-needle tasks S-NIAH 1 to 3 (Hsieh et al. 2024, arXiv 2404.06654): a number under a two-word key in
repeated noise, a number in prose, a UUID in prose. The prose here is the held-out text of the recipe.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybridize.errors import CheckpointError, UsageError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words(
    """
    amber ancient brave bright broad calm clever cold copper crisp curious distant eager early empty fading fierce
    gentle golden grand hidden hollow honest humble icy jolly keen lively lonely lucky mellow narrow noble odd pale
    patient plain proud quiet rapid rough royal rusty sharp silent silver simple sleepy smooth solid steady stormy sunny
    swift tender tidy tired urban velvet warm wild winter wooden young
    """
)
_SECOND = _words(
    """
    anchor apple arrow badge barrel basket beacon bottle branch bridge bucket button cabin candle canyon castle circle
    cloud compass copper cotton cradle desert engine falcon feather forest garden glacier hammer harbor helmet island
    jacket kettle ladder lantern lemon marble meadow mirror monkey mountain needle orchard paddle pebble pencil pepper
    pillow planet pocket ribbon river saddle shadow spider statue sunset tailor temple timber valley wagon window
    """
)

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")


@dataclass(frozen=True)
class Kind:
    """One of RULER's single-needle tasks: what the haystack is made of, and what is hidden in it."""

    prose: bool
    thing: str
    draw: Callable[[random.Random], str]


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


KINDS = {
    "niah_single_1": Kind(prose=False, thing="number", draw=_number),
    "niah_single_2": Kind(prose=True, thing="number", draw=_number),
    "niah_single_3": Kind(prose=True, thing="uuid", draw=_uuid),
}


@dataclass(frozen=True)
class Needle:
    """One question.

    Attributes:
        prompt: haystack with the needle, the question, and the beginning of the answer, to be continued.
        value: what the continuation must hold.
        prompt_tokens: length of the prompt, at most `tokens` and short of it by no more than a word of the haystack.
        position: share of the haystack's words that stand before the needle (the sentence boundary nearest `depth`).
    """

    kind: str
    tokens: int
    depth: float
    key: str
    value: str
    prompt: str
    prompt_tokens: int
    position: float


def make_needle(
    kind: str, tokens: int, depth: float, sample: int, *, seed: int, prose: Sequence[str], count: Callable[[str], int]
) -> Needle:
    """The question of that kind, length, depth and number; the same arguments give the same question.

    Args:
        tokens: length of the whole prompt.
        depth: where the needle stands, 0 (beginning) to 1 (end).
        prose: texts that the haystack is made of, in any order; used by the kinds that want prose.
        count: tokens of a text as the model will see it.

    Raises:
        UsageError: `tokens` has no room for the question alone.
        CheckpointError: a kind that wants prose, and there is none.
    """
    spec = KINDS[kind]
    rng = random.Random(f"{seed}/{kind}/{tokens}/{depth}/{sample}")
    key = f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}"
    value = spec.draw(rng)
    words = _haystack(prose if spec.prose else (NOISE,), tokens, rng if spec.prose else None, kind)

    def compose(num_words: int) -> tuple[str, float]:
        place = _boundary(words, num_words, depth)
        needle = f"One of the special magic {spec.thing}s for {key} is: {value}."
        text = " ".join((*words[:place], needle, *words[place:num_words]))
        return _TEMPLATE.format(thing=spec.thing, text=text, key=key), place / max(num_words, 1)

    num_words = _most_words(lambda n: count(compose(n)[0]), tokens, len(words))
    if num_words == 0:
        raise UsageError(
            f"a prompt of {tokens} tokens has no room for a haystack.",
            where="evaluate.recall.lengths",
            hint="Give lengths of at least 256 tokens.",
        )
    prompt, position = compose(num_words)
    return Needle(kind, tokens, depth, key, value, prompt, count(prompt), position)


_TEMPLATE = (
    "A special magic {thing} is hidden somewhere in the text below. Read the text with care and remember the {thing}; "
    "it will be asked for afterwards.\n{text}\n"
    "What is the special magic {thing} for {key} mentioned in the provided text? "
    "The special magic {thing} for {key} mentioned in the provided text is"
)


def _haystack(texts: Sequence[str], tokens: int, rng: random.Random | None, kind: str) -> list[str]:
    """At least `tokens` words (a word is a token or more), from texts in a drawn order, repeated when used up."""
    pieces = [words for text in texts if (words := text.split())]
    if not pieces:
        raise CheckpointError(
            f"{kind} hides its needle in held-out prose, and there is none.",
            where="data.held_out",
            hint="Give held-out documents, or ask for niah_single_1 alone (evaluate.recall.kinds).",
        )
    if rng is not None:
        rng.shuffle(pieces)
    haystack: list[str] = []
    while len(haystack) < tokens:
        for piece in pieces:
            haystack += piece[: tokens - len(haystack)]
    return haystack


def _boundary(words: Sequence[str], num_words: int, depth: float) -> int:
    """The sentence boundary among the first `num_words` words that is nearest to `depth`; both ends count as one."""
    wanted = depth * num_words
    ends = [i + 1 for i in range(num_words) if _SENTENCE_END.search(words[i])]
    return min((0, *ends, num_words), key=lambda place: abs(place - wanted))


def _most_words(count: Callable[[int], int], tokens: int, limit: int) -> int:
    """The most words with which a prompt has at most `tokens` tokens, by interpolation; 0 if even one is too many.

    A prompt's tokens grow nearly linearly with its words, so a few counts suffice where bisection needs a dozen.
    """
    low, low_count = 0, count(0)
    if low_count > tokens:
        return 0
    high, high_count = limit + 1, max(tokens + 1, round(low_count + 1.3 * limit))
    # Invariant: `low` words fit and `high` do not (a haystack of `limit` = `tokens` words and a question never fits).
    narrow = False
    while high - low > 1:
        share = 0.5 if narrow else (tokens - low_count) / max(high_count - low_count, 1)
        guess = min(max(low + round(share * (high - low)), low + 1), high - 1)
        found = count(guess)
        before = high - low
        if found <= tokens:
            low, low_count = guess, found
        else:
            high, high_count = guess, found
        narrow = high - low > before // 2  # interpolation closes in from one side; then halve once
    return low
