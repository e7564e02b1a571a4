"""The search: of all layers windowed, give back full attention to the one that helps most, again and again.

What a layer is worth depends on which others see everything, so it is asked anew after each; that is why the search
beats a ranking of the layers by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Measured(Protocol):
    """What the search asks (`Windowed`)."""

    layers: tuple[int, ...]

    def divergence(self, full: Collection[int]) -> float: ...
    def divergence_of_flips(self, full: Collection[int], flipped: Collection[int]) -> dict[int, float]: ...


@dataclass(frozen=True)
class Choice:
    """Layers with full attention, and what is left of the divergence with them.

    Attributes:
        name: how they were found.
        layers: in the order in which they were found.
        divergence: KL in nats per token.
    """

    name: str
    layers: tuple[int, ...]
    divergence: float


@dataclass(frozen=True)
class Search:
    """What the search found.

    Attributes:
        all_windowed: the divergence with full attention nowhere.
        steps: the layers in order, with the divergence after each of them.
        full_alone: by layer, the divergence if it alone has full attention.
        windowed_alone: by layer, the divergence if it alone is windowed.
        compared: other choices.
    """

    all_windowed: float
    steps: tuple[tuple[int, float], ...]
    full_alone: Mapping[int, float]
    windowed_alone: Mapping[int, float]
    compared: tuple[Choice, ...]

    @property
    def chosen(self) -> Choice:
        """All steps taken."""
        return Choice("greedy", tuple(layer for layer, _ in self.steps), self.steps[-1][1])


def search(measured: Measured, count: int, others: Mapping[str, Sequence[int]]) -> Search:
    """Looks for `count` layers to keep full attention, one after the other; of equal ones the lowest.

    Args:
        count: 1 to the number of layers for which it makes a difference.
        others: choices to compare with, by name.
    """
    layers = frozenset(measured.layers)
    full: frozenset[int] = frozenset()
    steps: list[tuple[int, float]] = []
    full_alone: Mapping[int, float] = {}
    while len(steps) < count:
        found = measured.divergence_of_flips(full, layers - full)
        full_alone = full_alone or found
        layer = min(found, key=lambda index: (found[index], index))
        steps.append((layer, found[layer]))
        full |= {layer}
    return Search(
        all_windowed=measured.divergence(()),
        steps=tuple(steps),
        full_alone=full_alone,
        windowed_alone=measured.divergence_of_flips(layers, layers),
        compared=tuple(Choice(name, tuple(some), measured.divergence(some)) for name, some in others.items()),
    )


def num_measurements(num_layers: int, count: int, num_others: int) -> int:
    """How often `search` measures all sequences."""
    return 1 + sum(num_layers - taken for taken in range(count)) + num_layers + num_others


def uniform(layers: Sequence[int], count: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Two choices with equal distances, by name: the first, and the last, of `count` stretches of the layers."""
    edges = [number * len(layers) // count for number in range(count + 1)]
    yield "evenly spaced, first of each stretch", tuple(layers[edge] for edge in edges[:-1])
    yield "evenly spaced, last of each stretch", tuple(layers[edge - 1] for edge in edges[1:])
