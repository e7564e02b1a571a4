"""Sampled texts against a loop that reads every text from its beginning for each token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridize.corpus.sampling.choice import Sampling, choose
from hybridize.corpus.sampling.writer import STEPS, Openings, Writer
from hybridize.corpus.teacher import split_texts
from hybridize.errors import UsageError
from tests.tiny import FAMILY_NAMES, VOCABULARY, tiny_teacher

END = 2


def chosen_by_a_loop(logits: torch.Tensor, number: float, sampling: Sampling) -> int:
    probability = (logits.double() / sampling.temperature).softmax(-1).tolist()
    order = list(range(len(probability)))
    if sampling.top_p < 1:
        order.sort(key=lambda token: -probability[token])
        kept, mass = [], 0.0
        for token in order:
            kept.append(token)
            mass += probability[token]
            if mass >= sampling.top_p:
                break
        order = kept
    number *= sum(probability[token] for token in order)
    upto = 0.0
    for token in order:
        upto += probability[token]
        if upto > number:
            return token
    return order[-1]


@torch.no_grad()
def texts_by_a_loop(
    model: object, openings: Openings, sampling: Sampling, numbers: torch.Tensor, longest: int
) -> list[list[tuple[int, bool]]]:
    """Of each row (token, whether a text ends with it), with one opening."""
    assert len(openings.tokens) == 1
    rows = []
    for column in numbers.T.tolist():
        read, written = list(openings.tokens[0][:1]), []
        for number in column:
            logits = model(torch.tensor([read])).logits[0, -1]  # type: ignore[operator]
            asked = openings.tokens[0][len(read) :]
            token = asked[0] if asked else chosen_by_a_loop(logits, number, sampling)
            read.append(token)
            ended = len(read) == longest or (not asked and token in openings.ends)
            written.append((token, ended))
            if ended:
                read = list(openings.tokens[0][:1])
        rows.append(written)
    return rows


def written(writer: Writer, steps: int) -> list[list[tuple[int, bool]]]:
    blocks = list(writer.write(steps))
    tokens = np.concatenate([block[0] for block in blocks])
    ended = np.concatenate([block[1] for block in blocks])
    return [list(zip(tokens[:, row].tolist(), ended[:, row].tolist(), strict=True)) for row in range(tokens.shape[1])]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("opening", [(1,), (1, 40, 41, 5)], ids=["bare", "prompt"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(2.0, 0.8)], ids=["all", "nucleus"])
def test_rows_are_those_of_a_loop(family: str, opening: tuple[int, ...], sampling: Sampling) -> None:
    openings = Openings([opening], [END, 7, 8, 9])
    batch, steps, longest = 3, 40, 12
    numbers = torch.rand(STEPS + 1, batch, generator=torch.Generator().manual_seed(5))[1 : steps + 1]
    expected = texts_by_a_loop(tiny_teacher(family), openings, sampling, numbers, longest)
    writer = Writer(tiny_teacher(family), openings, sampling, batch=batch, sequence_tokens=longest, seed=5)
    # One draw comes before the first step, as one row of numbers.
    assert written(writer, steps) == expected
    endings = [token for row in expected for token, ended in row if ended]
    assert len(endings) >= 3 * batch
    assert any(token not in openings.ends for token in endings) or opening == (1,)


def test_a_sliding_window_is_kept() -> None:
    openings, longest = Openings([(1,)], [END]), 24
    numbers = torch.rand(STEPS + 1, 2, generator=torch.Generator().manual_seed(0))[1:41]
    model = tiny_teacher("mistral", sliding_window=5)
    expected = texts_by_a_loop(model, openings, Sampling(), numbers, longest)
    full = texts_by_a_loop(tiny_teacher("mistral"), openings, Sampling(), numbers, longest)
    assert expected != full
    assert written(Writer(model, openings, Sampling(), batch=2, sequence_tokens=longest), 40) == expected


def test_same_seed_same_texts_and_another_seed_others() -> None:
    def texts(seed: int) -> list[list[tuple[int, bool]]]:
        openings = Openings([(1, 20), (1, 30, 31)], [END])
        return written(Writer(tiny_teacher(), openings, Sampling(), batch=4, sequence_tokens=9, seed=seed), 30)

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)


def test_every_opening_is_used_and_only_whole() -> None:
    openings = Openings([(1, 20), (1, 30, 31)], [END])
    writer = Writer(tiny_teacher(), openings, Sampling(), batch=5, sequence_tokens=6)
    texts = split_texts(writer.write(60))
    beginnings = {tuple(text[:2]) for text in texts if len(text) >= 2}
    assert {beginning[0] for beginning in beginnings} == {20, 30}
    assert all(beginning[1] == 31 for beginning in beginnings if beginning[0] == 30)
    assert all(len(text) <= 5 for text in texts)


def test_more_steps_than_fit_a_block_go_on_with_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridize.corpus.sampling.writer.STEPS", 8)
    openings, longest, steps = Openings([(1,)], [END]), 30, 20
    generator = torch.Generator().manual_seed(1)
    numbers = torch.cat([torch.rand(shape, 2, generator=generator) for shape in (1, 8, 8, 8)])[1 : steps + 1]
    expected = texts_by_a_loop(tiny_teacher(), openings, Sampling(), numbers, longest)
    writer = Writer(tiny_teacher(), openings, Sampling(), batch=2, sequence_tokens=longest, seed=1)
    blocks = list(writer.write(steps))
    assert [len(tokens) for tokens, _ in blocks] == [8, 8, 4]
    for row, texts in enumerate(expected):
        assert [token for tokens, _ in blocks for token in tokens[:, row].tolist()] == [token for token, _ in texts]
        assert [ends for _, ended in blocks for ends in ended[:, row].tolist()] == [ends for _, ends in texts]


@given(
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=12),
    st.lists(st.integers(1, 11), max_size=3),
)
def test_splitting_does_not_depend_on_the_blocks(ended: list[list[bool]], cuts: list[int]) -> None:
    endings = np.array(ended, bool).reshape(-1, 3)
    tokens = np.arange(endings.size).reshape(-1, 3)
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    blocks = [(tokens[a:b], endings[a:b]) for a, b in itertools.pairwise(edges)]
    texts = split_texts(blocks)
    assert texts == split_texts([(tokens, endings)] if len(tokens) else [])
    assert sorted(token for text in texts for token in text) == list(range(tokens.size))
    assert len(texts) >= endings.sum()


def test_choice_never_takes_what_cannot_be() -> None:
    logits = torch.full((3, 8), -torch.inf)
    logits[:, 3], logits[:, 5] = 0.0, 1.0
    numbers = torch.tensor([0.0, 0.5, 1 - 2**-24])
    for sampling in (Sampling(), Sampling(top_p=0.99)):
        assert set(choose(logits, numbers, sampling).tolist()) == {3, 5}
    assert choose(logits, numbers, Sampling(top_p=0.5)).tolist() == [5, 5, 5]


def test_choice_follows_the_probabilities() -> None:
    probability = torch.tensor([0.1, 0.0, 0.6, 0.3])
    numbers = (torch.arange(1000) + 0.5) / 1000
    drawn = choose(probability.log().expand(1000, -1), numbers, Sampling())
    assert torch.bincount(drawn, minlength=4).tolist() == [100, 0, 600, 300]
    assert VOCABULARY > 4


@pytest.mark.parametrize(("arguments", "says"), [((0.0,), "temperature"), ((1.0, 0.0), "top-p"), ((1.0, 1.5), "top-p")])
def test_refusals(arguments: tuple[float, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Sampling(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, 0.9)], ids=["all", "nucleus"])
def test_a_recorded_step_writes_what_a_loop_does(family: str, sampling: Sampling) -> None:
    openings, longest, steps = Openings([(1, 40, 41)], [END, 7, 8]), 24, STEPS + 20
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.rand(shape, 4, generator=generator) for shape in (1, STEPS, STEPS)])[1 : steps + 1]
    expected = texts_by_a_loop(tiny_teacher(family), openings, sampling, numbers, longest)
    writer = Writer(tiny_teacher(family).cuda(), openings, sampling, batch=4, sequence_tokens=longest)
    assert written(writer, steps) == expected


@pytest.mark.gpu
def test_recorded_steps_can_be_written_again() -> None:
    writer = Writer(tiny_teacher().cuda(), Openings([(1,)], [END]), Sampling(), batch=4, sequence_tokens=24)
    first, second = written(writer, 100), written(writer, 100)
    assert first != second
    again = Writer(tiny_teacher().cuda(), Openings([(1,)], [END]), Sampling(), batch=4, sequence_tokens=24)
    assert written(again, 100) == first
