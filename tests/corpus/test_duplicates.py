"""Duplicates against every pair compared word by word."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.corpus.duplicates import BAND_HASHES, NEAR, NUM_BANDS, find_duplicates, signature
from hybridize.corpus.shingles import SHINGLE_WORDS, Shingler, normalised, resemblance

WORDS = [f"w{number}" for number in range(60)]


def shingles_by_hand(text: str) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    width = min(SHINGLE_WORDS, len(words))
    return {tuple(words[start : start + width]) for start in range(len(words) - width + 1)}


def resemblance_by_hand(a: str, b: str) -> float:
    one, other = shingles_by_hand(a), shingles_by_hand(b)
    return len(one & other) / len(one | other)


def groups_by_hand(texts: list[str]) -> list[int]:
    """The first of each text's group: pairs that are near, joined until nothing changes."""
    first = list(range(len(texts)))
    changed = True
    while changed:
        changed = False
        for a in range(len(texts)):
            for b in range(a):
                if first[a] != first[b] and resemblance_by_hand(texts[a], texts[b]) >= NEAR:
                    first[a] = first[b] = min(first[a], first[b])
                    changed = True
    return first


def changed_copy(text: str, changes: int, generator: random.Random) -> str:
    words = text.split()
    for _ in range(changes if len(words) > changes else 0):
        place = generator.randrange(len(words))
        words[place : place + 1] = generator.choice([[], [generator.choice(WORDS)], [words[place], "more"]])
    return " ".join(words) or "nothing"


@st.composite
def families(draw: st.DrawFn) -> list[str]:
    """Texts, of which many are changed copies of earlier ones; some copies resemble them by just about `NEAR`."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    texts: list[str] = []
    for _ in range(draw(st.integers(1, 14))):
        if texts and generator.random() < 0.6:
            texts.append(changed_copy(generator.choice(texts), generator.choice([0, 1, 1, 2, 3, 5]), generator))
        else:
            length = generator.choice([1, 3, 5, 6, 40, 120])
            texts.append(" ".join(generator.choices(WORDS, k=length)))
    return texts


@given(families())
def test_property_groups_are_those_of_all_pairs(texts: list[str]) -> None:
    assert [kin.group for kin in find_duplicates(texts)] == groups_by_hand(texts)


@given(families())
def test_property_resemblance_is_that_of_the_words(texts: list[str]) -> None:
    shingler = Shingler()
    for a, b in zip(texts, reversed(texts), strict=True):
        found = resemblance(shingler(normalised(a)), shingler(normalised(b)))
        assert found == pytest.approx(resemblance_by_hand(a, b))


def test_case_and_white_space_make_no_difference() -> None:
    kin = find_duplicates(["The sea\nwas calm.", "the  SEA was\tcalm.", "The sea was calm!", "The sea\nwas calm."])
    assert [(each.group, each.exact) for each in kin] == [(0, False), (0, True), (2, False), (0, True)]


def test_chains_are_one_group() -> None:
    words = [f"word{number}" for number in range(100)]
    texts = [" ".join(words[start : start + 80]) for start in (0, 7, 14)]
    assert resemblance_by_hand(texts[0], texts[1]) >= NEAR > resemblance_by_hand(texts[0], texts[2])
    assert [kin.group for kin in find_duplicates(texts)] == [0, 0, 0]


def test_many_copies_of_one_text_are_not_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def counted(a: np.ndarray, b: np.ndarray) -> float:
        compared.append(1)
        return resemblance(a, b)

    monkeypatch.setattr("hybridize.corpus.duplicates.resemblance", counted)
    words = [f"word{number}" for number in range(80)]
    texts = [" ".join([*words[:-1], f"other{number}"]) for number in range(300)]
    assert {kin.group for kin in find_duplicates(texts)} == {0}
    assert len(compared) == len(texts) - 1


def test_near_begins_where_it_is_said() -> None:
    """With 80 words in a row of which the last k differ, 76 - k shingles of 76 + k are in both."""
    words = [f"word{number}" for number in range(80)]
    for k in range(1, 20):
        other = [*words[: 80 - k], *(f"other{number}" for number in range(k))]
        near = find_duplicates([" ".join(words), " ".join(other)])[1].group == 0
        assert near == ((76 - k) / (76 + k) >= NEAR), k


def test_signatures_agree_as_often_as_sets_resemble() -> None:
    generator = np.random.default_rng(0)
    values = np.unique(generator.integers(2**64, size=9000, dtype=np.uint64))
    a, b = np.sort(values[:6000]), np.sort(values[3000:9000])
    agreed = (signature(a) == signature(b)).mean()
    expected = resemblance(a, b)
    error = (expected * (1 - expected) / (NUM_BANDS * BAND_HASHES)) ** 0.5
    assert agreed == pytest.approx(expected, abs=4 * error)


def test_hashes_are_the_same_in_every_process() -> None:
    """A changed hash would change which documents are kept."""
    assert Shingler()("a b c d e").tolist() == [EXPECTED]


EXPECTED = 9643349072635376471
