"""Groups documents that are the same but for case, white space and small changes.

Two documents are near duplicates when their resemblance (`hybridize.corpus.shingles`) is at least `NEAR`; a group are
the documents that a chain of such pairs joins. Pairs worth a look are found by MinHash (Broder 1997): the smallest
hash of two sets is the same with a probability that is their resemblance r. Of 128 such hashes, bands of 4 are
compared, so that a pair is looked at with probability 1 - (1 - r⁴)³² (above 1 - 10⁻⁷ from r = 0.8 on), and what was
found is checked with the whole sets. The sets stay in memory, 8 bytes a word. A short text that stands inside of a long
one is not near it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybridize.corpus.shingles import Shingler, Shingles, mixed, normalised, resemblance
from hybridize.progress import SILENT, Reporter

NEAR = 0.8
NUM_BANDS = 32
BAND_HASHES = 4
_BLOCK = 4096
"""Shingles that are hashed at a time: what fits a processor's cache."""


@dataclass(frozen=True)
class Kin:
    """What a document is to the ones before it.

    Attributes:
        group: number of the first document of its group; its own when nothing before it is like it.
        exact: an earlier document has the same normalised text.
    """

    group: int
    exact: bool = False


def find_duplicates(texts: Sequence[str], reporter: Reporter = SILENT) -> list[Kin]:
    """What each text is to the earlier ones."""
    first: dict[str, int] = {}
    same = []
    for number, text in enumerate(texts):
        same.append(first.setdefault(normalised(text), number))
    distinct = list(first.values())
    groups = _near_groups(list(first), reporter)
    group_of = {number: distinct[group] for number, group in zip(distinct, groups, strict=True)}
    return [Kin(group_of[earliest], earliest != number) for number, earliest in enumerate(same)]


def _near_groups(normal: Sequence[str], reporter: Reporter) -> list[int]:
    shingler = Shingler()
    shingles: list[Shingles] = []
    signatures = np.empty((len(normal), NUM_BANDS * BAND_HASHES), np.uint64)
    with reporter.task("looking for duplicates", len(normal)) as task:
        for number, text in enumerate(normal):
            shingles.append(shingler(text))
            signatures[number] = signature(shingles[-1])
            task.advance()
    groups = _Groups(len(normal))
    near = _Near(shingles)
    for run in _equal_bands(signatures):
        _join_near(run, groups, near)
    return [groups.first(number) for number in range(len(normal))]


def _join_near(run: Sequence[int], groups: _Groups, near: _Near) -> None:
    """Joins documents of a run that are near; of those that are joined already no pair is looked at again."""
    members: dict[int, list[int]] = {}
    for number in run:
        members.setdefault(groups.first(number), []).append(number)
    found: list[list[int]] = []
    for own in members.values():
        joined, others = own, []
        for group in found:
            if any(itertools.starmap(near, itertools.product(group, own))):
                groups.join(group[0], own[0])
                joined = group + joined
            else:
                others.append(group)
        found = [*others, joined]


def signature(shingles: Shingles) -> NDArray[np.uint64]:
    """[NUM_BANDS · BAND_HASHES] smallest value of each hash function over the set."""
    random = np.random.Generator(np.random.PCG64(1997))
    factors, terms = random.integers(2**64, size=(2, NUM_BANDS * BAND_HASHES, 1), dtype=np.uint64)
    factors |= np.uint64(1)  # odd, so that the multiplication is a permutation
    smallest = np.full(len(factors), 2**64 - 1, np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        hashed = factors * shingles[None, start : start + _BLOCK] + terms
        np.minimum(smallest, hashed.min(axis=1), out=smallest)
    return smallest


def _equal_bands(signatures: NDArray[np.uint64]) -> Iterator[list[int]]:
    """Documents that agree in a whole band, earlier ones first."""
    for band in np.split(signatures, NUM_BANDS, axis=1):
        key = np.zeros(len(band), np.uint64)
        for column in band.T:
            key = mixed(key + column)
        order = np.argsort(key, kind="stable")
        edges = np.flatnonzero(np.diff(key[order])) + 1
        yield from (run.tolist() for run in np.split(order, edges) if len(run) > 1)


class _Near:
    """Whether two documents are near; remembers those that are not, which may meet in many bands."""

    def __init__(self, shingles: Sequence[Shingles]) -> None:
        self._shingles = shingles
        self._apart: set[tuple[int, int]] = set()

    def __call__(self, a: int, b: int) -> bool:
        pair = (min(a, b), max(a, b))
        if pair in self._apart:
            return False
        one, other = self._shingles[a], self._shingles[b]
        sizes = sorted((len(one), len(other)))
        # No more than all of the smaller set can be in both.
        found = sizes[0] >= NEAR * sizes[1] and resemblance(one, other) >= NEAR
        if not found:
            self._apart.add(pair)
        return found


class _Groups:
    """Disjoint sets of numbers, each known by its smallest."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def first(self, number: int) -> int:
        while self._above[number] != number:
            self._above[number] = self._above[self._above[number]]
            number = self._above[number]
        return number

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.first(a), self.first(b)))
        self._above[b] = a
