"""Means with their uncertainty: clustered by text window for losses, Wilson's interval for shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point


class Mean(NamedTuple):
    """A mean over tokens and its standard error; None with fewer than two windows."""

    value: float
    standard_error: float | None


def clustered_mean(sums: Sequence[float], counts: Sequence[int]) -> Mean:
    """The mean over all tokens, where tokens of one window are not independent.

    The standard error is that of a ratio estimator over windows: sqrt(k/(k-1) · Σ(sum_w − mean·n_w)²) / Σn_w
    (Cochran, Sampling Techniques, 6.3, without the finite-population correction).

    Args:
        sums: of the quantity over each window.
        counts: tokens of each window, all positive.
    """
    total = sum(counts)
    mean = math.fsum(sums) / total
    k = len(sums)
    if k < 2:
        return Mean(mean, None)
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return Mean(mean, math.sqrt(k / (k - 1) * squares) / total)


def wilson_interval(hits: float, samples: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default (Wilson 1927, JASA 22:209). It stays within 0..1 and is
    right for the few samples that a recall cell has, where the normal interval is not.

    Args:
        hits: the sum of scores between 0 and 1.
    """
    if samples <= 0:
        raise ValueError(f"an interval needs at least one sample, got {samples}")
    share = hits / samples
    scale = 1 + z * z / samples
    centre = (share + z * z / (2 * samples)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    low = 0.0 if hits == 0 else max(0.0, centre - half)  # exact at the ends, where rounding leaves 1e-17
    high = 1.0 if hits == samples else min(1.0, centre + half)
    return low, high


def share_ratio_interval(
    numerator: tuple[float, float, float], denominator: tuple[float, float, float]
) -> tuple[float, float | None]:
    """Interval of a ratio of two shares from the interval of each (MOVER: Donner and Zou 2012, SMMR 21:347, eq. 9).

    The shares are taken as independent. Answers of student and teacher to the same questions are correlated
    positively, so the interval is wider than it need be.

    Args:
        numerator, denominator: (share, low, high); the denominator's share is positive.

    Returns:
        low and high; high is None where the denominator may be zero.
    """
    p, low_p, high_p = numerator
    q, low_q, high_q = denominator
    squared = (p * q) ** 2

    def root(of_p: float, of_q: float) -> float:
        return math.sqrt(max(0.0, squared - of_p * (2 * p - of_p) * of_q * (2 * q - of_q)))

    low = low_p * (2 * p - low_p) / (p * q + root(low_p, high_q)) if p > 0 else 0.0
    return low, None if low_q <= 0 else (p * q + root(high_p, low_q)) / (low_q * (2 * q - low_q))


def position_buckets(edges: Sequence[int], longest: int) -> list[tuple[int, int]]:
    """Half-open ranges of token positions that cover 0..longest: the edges below `longest`, the last one cut there."""
    starts = sorted({0, *(edge for edge in edges if 0 < edge < longest)})
    return list(zip(starts, [*starts[1:], longest], strict=True))
