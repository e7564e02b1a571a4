from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.evaluation.statistics import clustered_mean, position_buckets, wilson_interval


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
