"""Texts as sets of shingles, and the share of shingles that two texts have in common.

Broder, "On the resemblance and containment of documents" (1997), https://doi.org/10.1109/SEQUEN.1997.666900: a shingle
is a run of w successive words, and the resemblance of two documents is |S(A) ∩ S(B)| / |S(A) ∪ S(B)|.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Shingles = NDArray[np.uint64]
"""Hashes of the shingles of one text, each once, in order."""

SHINGLE_WORDS = 5
_BASE = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """The text as it is compared: without case, and with one space between words."""
    return " ".join(text.casefold().split())


class Shingler:
    """Makes the shingles of texts; remembers the hashes of words.

    A text of fewer than `SHINGLE_WORDS` words is one shingle. Words are what white space parts, so that in scripts
    without spaces only texts with equal lines resemble each other.
    """

    def __init__(self) -> None:
        self._hashes = _WordHashes()

    def __call__(self, normal: str) -> Shingles:
        """The shingles of a normalised text."""
        words = normal.split(" ")
        hashes = np.fromiter((self._hashes[word] for word in words), np.uint64, len(words))
        width = min(len(words), SHINGLE_WORDS)
        count = len(words) - width + 1
        rolled = np.zeros(count, np.uint64)
        for place in range(width):
            rolled = rolled * _BASE + hashes[place : place + count]
        return np.unique(mixed(rolled))


class _WordHashes(dict[str, int]):
    """Python's own hashes differ from process to process."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of 64-bit numbers in which every bit depends on all (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def resemblance(a: Shingles, b: Shingles) -> float:
    """Shingles that both have, as a share of those that either has."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
