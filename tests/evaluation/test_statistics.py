from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.evaluation.statistics import clustered_mean, position_buckets, share_ratio_interval, wilson_interval


@pytest.mark.parametrize(
    ("hits", "samples", "low", "high"),
    [  # computed with the closed form by hand for z = 1.96, as in tables of the Wilson interval
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, table I
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_interval_matches_published_values(hits: int, samples: int, low: float, high: float) -> None:
    assert wilson_interval(hits, samples) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_stays_in_bounds(case: tuple[int, int]) -> None:
    hits, samples = case
    low, high = wilson_interval(hits, samples)
    assert 0 <= low <= hits / samples <= high <= 1
    assert low < high


def test_wilson_interval_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0, 0)


def test_clustered_mean_of_equal_windows_is_the_ordinary_standard_error() -> None:
    means = [2.0, 3.5, 1.0, 4.0, 2.5]
    mean, error = clustered_mean([m * 7 for m in means], [7] * 5)
    assert mean == pytest.approx(statistics.mean(means))
    assert error == pytest.approx(statistics.stdev(means) / math.sqrt(5))


def test_clustered_mean_weighs_windows_by_their_tokens() -> None:
    mean, _ = clustered_mean([10.0, 1.0], [10, 1])
    assert mean == 1.0
    mean, _ = clustered_mean([20.0, 1.0], [10, 1])
    assert mean == pytest.approx(21 / 11)


def test_one_window_has_no_standard_error() -> None:
    assert clustered_mean([6.0], [3]) == (2.0, None)


@given(st.lists(st.integers(0, 5000), max_size=8), st.integers(1, 5000))
def test_buckets_cover_every_position_once(edges: list[int], longest: int) -> None:
    buckets = position_buckets(edges, longest)
    covered = [position for start, end in buckets for position in range(start, end)]
    assert covered == list(range(longest))
    assert {start for start, _ in buckets} == {0, *(edge for edge in edges if 0 < edge < longest)}


def test_the_interval_of_a_ratio_by_donner_and_zou() -> None:
    # Both limits of a ratio of equal shares are each other's reciprocals.
    share = (0.6, *wilson_interval(12, 20))
    low, high = share_ratio_interval(share, share)
    assert high is not None
    assert low * high == pytest.approx(1.0)
    # Their formula, written out for 12 of 20 over 15 of 20.
    (p, l1, u1), (q, l2, u2) = share, (0.75, *wilson_interval(15, 20))
    low, high = share_ratio_interval((p, l1, u1), (q, l2, u2))
    root = math.sqrt((p * q) ** 2 - l1 * u2 * (2 * p - l1) * (2 * q - u2))
    assert low == pytest.approx((p * q - root) / (u2 * (2 * q - u2)))
    root = math.sqrt((p * q) ** 2 - u1 * l2 * (2 * p - u1) * (2 * q - l2))
    assert high == pytest.approx((p * q + root) / (l2 * (2 * q - l2)))


def test_nothing_found_keeps_nothing_and_its_interval_begins_there() -> None:
    low, high = share_ratio_interval((0.0, *wilson_interval(0, 9)), (1.0, *wilson_interval(9, 9)))
    assert low == 0.0
    assert high is not None
    assert 0.2 < high < 0.6
    assert share_ratio_interval((0.5, 0.2, 0.8), (0.1, 0.0, 0.4))[1] is None


@given(st.integers(0, 30), st.integers(1, 30), st.integers(30, 60))
def test_a_ratio_lies_in_its_interval_property(hits: int, others: int, samples: int) -> None:
    p, q = hits / samples, others / samples
    low, high = share_ratio_interval((p, *wilson_interval(hits, samples)), (q, *wilson_interval(others, samples)))
    assert 0 <= low <= p / q + 1e-12
    assert high is None or high >= p / q - 1e-12


@given(st.integers(1, 12), st.integers(1, 12))
def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says_property(a: int, b: int) -> None:
    """Exact coverage over all outcomes of two independent samples of 12, weighted by their probability."""
    n, p, q = 12, a / 13, b / 13
    covered = total = 0.0
    for x in range(n + 1):
        for y in range(1, n + 1):
            weight = math.comb(n, x) * p**x * (1 - p) ** (n - x) * math.comb(n, y) * q**y * (1 - q) ** (n - y)
            low, high = share_ratio_interval((x / n, *wilson_interval(x, n)), (y / n, *wilson_interval(y, n)))
            total += weight
            covered += weight * (low <= p / q and (high is None or p / q <= high))
    assert covered / total > 0.90
