"""How many tokens of each source a mixture holds, and which documents these are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hybridize.errors import UsageError


@dataclass(frozen=True)
class Weight:
    """A source's part of the mixture.

    Attributes:
        value: how often its documents are taken, relative to the other sources (1: everything once, 0.5: half of it);
            or, with `of_mixture`, the share of the mixture's tokens.
        of_mixture: which of the two.
    """

    value: float = 1.0
    of_mixture: bool = False

    def __str__(self) -> str:
        return f"{self.value:.12g}" if not self.of_mixture else f"{self.value * 100:.12g}%"


def wanted_tokens(
    sizes: Sequence[int], weights: Sequence[Weight], *, total: float | None = None, max_repeats: int = 1
) -> list[float]:
    """Tokens of each source in the mixture, before a source that has too few cuts them short.

    Args:
        sizes: tokens that each source has; not all of them none.
        weights: one a source.
        total: tokens of the mixture; None: as many as the weights make of the sources. If all weights are shares of the
            mixture, that is as many as there can be without any source falling short of its share.
        max_repeats: how often a source may be used.

    Raises:
        UsageError: the shares come to more than the mixture, or leave nothing for the other sources.
    """
    of_mixture = sum(weight.value for weight in weights if weight.of_mixture)
    own = [0.0 if weight.of_mixture else weight.value * size for size, weight in zip(sizes, weights, strict=True)]
    others = sum(own)
    if of_mixture > 1 + 1e-9 or (others and of_mixture > 1 - 1e-9):
        left = "and leave nothing for the other sources" if of_mixture <= 1 + 1e-9 else "of the mixture"
        hint = "Lower the percentages, or give every source one."
        raise UsageError(f"the shares come to {of_mixture:.0%} {left}.", where="--text", hint=hint)
    scale = of_mixture if not others else 1.0  # shares alone are relative to one another
    shares = [weight.value / scale if weight.of_mixture else 0.0 for weight in weights]
    if total is None and others:
        total = others / (1 - of_mixture)
    elif total is None:  # every source that has text has a share
        total = min(size * max_repeats / share for size, share in zip(sizes, shares, strict=True) if share and size)
    rest = total * (1 - sum(shares)) / others if others else 0.0
    return [total * share + rest * mine for share, mine in zip(shares, own, strict=True)]


def draw(lengths: Sequence[int], wanted: float, *, max_repeats: int, seed: str) -> list[int]:
    """Numbers of the documents that make `wanted` tokens.

    Whole documents are taken; one that would lead further away than it leads near is passed over. What is drawn differs
    from what is wanted by at most half of the longest document, unless all documents `max_repeats` times are too few.
    Every document is drawn once, in a new order each time, before any is drawn again.
    """
    drawn: list[int] = []
    tokens = 0
    generator = random.Random(seed)
    for _ in range(max_repeats):
        order = list(range(len(lengths)))
        generator.shuffle(order)
        before = len(drawn)
        for number in order:
            if tokens + lengths[number] / 2 <= wanted:
                drawn.append(number)
                tokens += lengths[number]
        if len(drawn) < before + len(lengths):
            break
    return drawn
