"""The search over numbers that are known."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.distillation.layer_choice.greedy import num_measurements, search, uniform


class Known:
    """Divergences from a table of sets of layers."""

    def __init__(self, table: Mapping[frozenset[int], float], layers: Collection[int]) -> None:
        self.table = table
        self.layers = tuple(layers)
        self.asked = 0

    def divergence(self, full: Collection[int]) -> float:
        self.asked += 1
        return self.table[frozenset(full)]

    def divergence_of_flips(self, full: Collection[int], flipped: Collection[int]) -> dict[int, float]:
        return {index: self.divergence(frozenset(full) ^ {index}) for index in flipped}


LAYERS = (0, 1, 3, 4)
SETS = [frozenset(some) for size in range(5) for some in combinations(LAYERS, size)]
# Few values, so that many are equal.
TABLES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=len(SETS), max_size=len(SETS))


@given(values=TABLES, count=st.integers(1, 4))
def test_every_step_takes_the_best_of_what_is_left(values: list[float], count: int) -> None:
    table = dict(zip(SETS, values, strict=True))
    known = Known(table, LAYERS)
    found = search(known, count, {"ends": (0, 4)})
    full: frozenset[int] = frozenset()
    for layer, value in found.steps:
        for other in set(LAYERS) - full:
            assert (value, layer) <= (table[full | {other}], other)
        full |= {layer}
        assert value == table[full]
    assert len(full) == count
    assert set(found.chosen.layers) == full
    assert found.chosen.divergence == table[full]
    assert found.all_windowed == table[frozenset()]
    assert found.full_alone == {index: table[frozenset({index})] for index in LAYERS}
    assert found.windowed_alone == {index: table[frozenset(LAYERS) - {index}] for index in LAYERS}
    assert [(choice.name, choice.divergence) for choice in found.compared] == [("ends", table[frozenset({0, 4})])]
    assert known.asked == num_measurements(4, count, 1)


def test_it_is_no_ranking_of_single_layers() -> None:
    """0 and 1 do the same work; 3 and 4 are of use together with others alone."""
    worth = {0: 5.0, 1: 4.0, 3: 0.0, 4: 0.0}
    table = {
        some: 9.0 - max((worth[index] for index in some), default=0.0) - (3 in some and 0 in some) for some in SETS
    }
    found = search(Known(table, LAYERS), 2, {})
    assert found.chosen.layers == (0, 3)
    assert sorted(found.full_alone, key=lambda index: found.full_alone[index])[:2] == [0, 1]


@pytest.mark.parametrize(
    ("num_layers", "count", "first", "last"),
    [
        (8, 2, (0, 4), (3, 7)),
        (30, 10, tuple(range(0, 30, 3)), tuple(range(2, 30, 3))),
        (30, 8, (0, 3, 7, 11, 15, 18, 22, 26), (2, 6, 10, 14, 17, 21, 25, 29)),
        (4, 1, (0,), (3,)),
    ],
)
def test_uniform(num_layers: int, count: int, first: tuple[int, ...], last: tuple[int, ...]) -> None:
    assert [layers for _, layers in uniform(range(num_layers), count)] == [first, last]


@given(layers=st.sets(st.integers(0, 50), min_size=1), data=st.data())
def test_uniform_choices_are_evenly_spaced(layers: set[int], data: st.DataObject) -> None:
    ordered = sorted(layers)
    count = data.draw(st.integers(1, len(ordered)))
    for _, chosen in uniform(ordered, count):
        places = [ordered.index(layer) for layer in chosen]
        gaps = {after - before for before, after in pairwise(places)}
        assert len(set(chosen)) == count
        assert max(gaps, default=1) - min(gaps, default=1) <= 1
