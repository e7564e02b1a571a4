"""How much of each source a mixture takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.corpus.ingredients import CorpusOptions, parse_ingredient, parse_tokens
from hybridize.corpus.mixture import Weight, draw, wanted_tokens
from hybridize.errors import UsageError


def share(value: float) -> Weight:
    return Weight(value, of_mixture=True)


def test_everything_once_by_default() -> None:
    assert wanted_tokens([30, 70], [Weight(), Weight()]) == [30, 70]


def test_half_of_a_source() -> None:
    assert wanted_tokens([30, 70], [Weight(0.5), Weight()]) == [15, 70]


def test_a_tenth_of_the_mixture() -> None:
    assert wanted_tokens([900, 5000], [Weight(), share(0.1)]) == pytest.approx([900, 100])


def test_a_total_keeps_the_weights() -> None:
    assert wanted_tokens([300, 700, 50], [Weight(), Weight(0.5), share(0.2)], total=100) == pytest.approx(
        [80 * 300 / 650, 80 * 350 / 650, 20]
    )


def test_shares_alone_are_relative_and_as_large_as_can_be() -> None:
    assert wanted_tokens([100, 500], [share(0.4), share(0.4)]) == pytest.approx([100, 100])
    assert wanted_tokens([100, 500], [share(0.4), share(0.4)], max_repeats=2) == pytest.approx([200, 200])


@pytest.mark.parametrize("weights", [[share(0.6), share(0.6)], [share(1.0), Weight()]])
def test_shares_of_more_than_there_is_are_refused(weights: list[Weight]) -> None:
    with pytest.raises(UsageError, match="the shares come to"):
        wanted_tokens([10, 10], weights)


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=30),
    st.floats(0, 3),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_property_what_is_drawn_is_within_half_a_document(
    lengths: list[int], part: float, max_repeats: int, seed: int
) -> None:
    wanted = part * sum(lengths)
    drawn = draw(lengths, wanted, max_repeats=max_repeats, seed=str(seed))
    tokens = sum(lengths[number] for number in drawn)
    most = max_repeats * sum(lengths)
    assert abs(tokens - min(wanted, most)) <= max(lengths) / 2
    used = [drawn.count(number) for number in range(len(lengths))]
    assert max(used) - min(used) <= 1
    assert max(used) <= max_repeats
    assert drawn == draw(lengths, wanted, max_repeats=max_repeats, seed=str(seed))


def test_one_long_document_does_not_end_the_drawing() -> None:
    for seed in range(10):
        drawn = draw([1000, *[10] * 50], 200, max_repeats=3, seed=str(seed))
        assert len(drawn) == 20
        assert 0 not in drawn


def test_the_order_is_drawn() -> None:
    orders = {tuple(draw([1] * 20, 20, max_repeats=1, seed=str(seed))) for seed in range(5)}
    assert len(orders) == 5
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(20))}


@pytest.mark.parametrize(
    ("text", "path", "name", "weight"),
    [
        ("a/linux.txt", "a/linux.txt", "linux", Weight()),
        ("a/linux.txt=0.5", "a/linux.txt", "linux", Weight(0.5)),
        ("kernel:a/linux.txt=12.5%", "a/linux.txt", "kernel", share(0.125)),
        ("package:words/data/*.txt", "package:words/data/*.txt", "data", Weight()),
        ("w:package:words/x.txt=2", "package:words/x.txt", "w", Weight(2.0)),
        ("a=b/c.txt", "a=b/c.txt", "c", Weight()),
        ("texts/*.txt", "texts/*.txt", "texts", Weight()),
    ],
)
def test_ingredients(text: str, path: str, name: str, weight: Weight) -> None:
    ingredient = parse_ingredient(text)
    assert (ingredient.source.path, ingredient.name, ingredient.weight) == (path, name, weight)


@pytest.mark.parametrize("text", ["a.txt=0", "a.txt=-1", "a.txt=101%", "a.txt=1e999", "a.txt=..5"])
def test_weights_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is no weight") as caught:
        parse_ingredient(text)
    assert caught.value.hint


@pytest.mark.parametrize(("text", "count"), [("30M", 30_000_000), ("500k", 500_000), ("1.5b", 1_500_000_000), ("7", 7)])
def test_numbers_of_tokens(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "0", "many", "-3k", "3T", "1e6"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(UsageError, match="not a number of tokens"):
        parse_tokens(text)


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two sources are called 'a'"):
        CorpusOptions((parse_ingredient("x/a.txt"), parse_ingredient("y/a.txt")))
    CorpusOptions((parse_ingredient("x/a.txt"), parse_ingredient("b:y/a.txt")))


def test_a_corpus_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no text"):
        CorpusOptions(())
