"""What is held: against the rule of eviction, and in cases where it is known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.evaluation.inside.held import equal_length_batches, held_after
from hybridize.evaluation.inside.layers import listening
from hybridize.evaluation.inside.retention import by_place, needles, retention
from hybridize.evaluation.items import Item
from hybridize.mixers.base import Rope
from hybridize_kernels import eviction_position
from tests.evaluation.inside.hybrids import DELTA, EVICTION, FULL, SPARSE, make_texts, tiny_hybrid


def decided_scores(hybrid: Any, layer: int, tokens: Tensor) -> Tensor:
    """The score of every token, [B, T, H], as the layer computes it."""
    mixer, found = hybrid.model.layers[layer].self_attn, []

    def hear(x: Tensor, rope: Rope) -> None:
        k, v = (project(x).unflatten(-1, (-1, mixer.geometry.head_size)) for project in (mixer.k_proj, mixer.v_proj))
        found.append(mixer._decide(mixer._logits(k, v, None), None).decided)

    with torch.no_grad(), listening(hybrid, {layer: hear}):
        hybrid(tokens)
    return found[0]


def item(length: int, *evidence: tuple[int, int], seed: int = 0) -> Item:
    prompt = make_texts(*[length] * (seed + 1))[seed].tokens
    return Item("niah_single_1", prompt, ("7",), 8, length, 0.5, evidence=evidence)


def biased(bias: float, **changes: Any) -> Any:
    """A model whose scorers say the same of every token."""
    return tiny_hybrid(FULL, {**EVICTION, "scorer_bias_init": bias, **changes}, shaken=0.0)


@pytest.mark.parametrize("changes", [{}, {"budget_tokens": 2}, {"sink_tokens": 0}, {"window_tokens": 5}])
@pytest.mark.parametrize("length", [3, 8, 9, 15, 41])
def test_held_tokens_follow_the_rule_of_eviction(length: int, changes: dict[str, Any]) -> None:
    mixer = {**EVICTION, **changes}
    window, sinks, budget = mixer["window_tokens"], mixer["sink_tokens"], mixer["budget_tokens"]
    hybrid, texts = tiny_hybrid(FULL, mixer, DELTA, mixer), [w.tokens for w in make_texts(length, length)]
    positions = torch.arange(length).expand(2, -1)
    held = dict(held_after(hybrid, texts, batch_tokens=999))
    for layer in (1, 3):
        score = decided_scores(hybrid, layer, torch.tensor(texts))
        evicted = eviction_position(score, positions, sinks=sinks, budget=budget, window=window)
        for row in range(2):
            assert held[row].keys() == {1, 3}
            for head in range(2):
                expected = [
                    length - 1 - j < window
                    or ((j < sinks or float(score[row, j, head]) > 0) and length - 1 - window < evicted[row, j, head])
                    for j in range(length)
                ]
                assert held[row][layer][head].tolist() == expected


def test_texts_of_any_lengths_in_any_batches() -> None:
    hybrid = tiny_hybrid(EVICTION, SPARSE)
    texts = [w.tokens for w in make_texts(20, 31, 20, 5, 31)]
    for batch_tokens in (1, 40, 999):
        batches = list(equal_length_batches(texts, batch_tokens))
        assert sorted(i for batch in batches for i in batch) == list(range(5))
        assert all(len(batch) == 1 or sum(len(texts[i]) for i in batch) <= batch_tokens for batch in batches)
        found = dict(held_after(hybrid, texts, batch_tokens=batch_tokens))
        for i, text in enumerate(texts):
            ((_, alone),) = held_after(hybrid, [text], batch_tokens=1)
            assert torch.equal(found[i][0], alone[0])


def test_retention_counts_what_is_held() -> None:
    hybrid, windows = tiny_hybrid(FULL, EVICTION, EVICTION), make_texts(41, 33, 41)
    row = retention(hybrid, windows, batch_tokens=90)
    held = dict(held_after(hybrid, [w.tokens for w in windows], batch_tokens=1))
    assert row is not None
    assert (row["texts"], row["tokens"], [layer["index"] for layer in row["layers"]]) == (3, 115, [1, 2])
    uses = []
    for layer in row["layers"]:
        assert (layer["window_tokens"], layer["budget_tokens"]) == (8, 6)
        for head, found in enumerate(layer["heads"]):
            places, kept = [0] * 10, 0
            for i, window in enumerate(windows):
                outside = len(window.tokens) - 8
                for token in range(outside):
                    if held[i][layer["index"]][head, token]:
                        kept += 1
                        places[10 * token // outside] += 1
            assert found["kept"] == pytest.approx(kept / 3)
            assert found["use"] == pytest.approx(kept / 3 / 6)
            assert found["places"] == pytest.approx([place / kept for place in places])
            uses.append(found["use"])
    assert 0 < min(uses) <= max(uses) <= 1


def test_a_budget_for_all_keeps_all_and_a_scorer_that_refuses_keeps_the_sinks() -> None:
    windows = make_texts(48)
    row = retention(biased(9.0, budget_tokens=64), windows, batch_tokens=99)
    assert row is not None
    for head in row["layers"][0]["heads"]:
        assert head["kept"] == 40
        assert head["use"] == 40 / 64
        assert head["places"] == pytest.approx([0.1] * 10)
    row = retention(biased(-9.0), windows, batch_tokens=99)
    assert row is not None
    assert [head["kept"] for head in row["layers"][0]["heads"]] == [2, 2]
    assert row["layers"][0]["heads"][0]["places"] == [1.0, *[0.0] * 9]


@pytest.mark.parametrize("length", [2, 8])
def test_a_text_inside_the_window_retains_nothing(length: int) -> None:
    row = retention(biased(9.0), make_texts(length), batch_tokens=99)
    assert row is not None
    assert row["layers"][0]["heads"][0] == {"kept": 0.0, "use": 0.0, "places": [0.0] * 10}


def test_places_of_fewer_than_ten_tokens() -> None:
    held = torch.tensor([[True, False, True, True, True]])
    assert by_place(held, 2).tolist() == [[1, 0, 0, 0, 0, 0, 1, 0, 0, 0]]
    assert by_place(held, 5).tolist() == [[0] * 10]


def test_a_needle_counts_where_it_is_retained_or_in_the_window() -> None:
    keeps_sinks = biased(-9.0)

    def share(*evidence: tuple[int, int]) -> list[float]:
        row = needles(keeps_sinks, [item(40, *evidence)], batch_tokens=99)
        assert row is not None
        assert (row["texts"], row["tokens"]) == (1, 40)
        (layer,) = row["layers"]
        assert layer["index"] == 1
        return layer["heads"]

    assert share((32, 36)) == [1, 1]  # in the window
    assert share((0, 2)) == [1, 1]  # sinks
    assert share((10, 14)) == [0, 0]
    assert share((30, 34)) == [0.5, 0.5]
    assert share((1, 3), (2, 5)) == [0.25, 0.25]  # tokens 1 to 4, none of them twice


def test_needles_are_the_mean_over_prompts() -> None:
    hybrid = tiny_hybrid(EVICTION, FULL)
    items = [item(40, (5, 12), seed=0), item(40, seed=1), item(40, (20, 26), (30, 33), seed=2)]
    row = needles(hybrid, items, batch_tokens=85)
    held = dict(held_after(hybrid, [i.prompt for i in items], batch_tokens=1))
    assert row is not None
    assert (row["texts"], row["tokens"]) == (2, 80)
    for head in range(2):
        first = sum(held[0][0][head, j].item() for j in range(5, 12)) / 7
        last = sum(held[2][0][head, j].item() for j in (*range(20, 26), *range(30, 33))) / 9
        assert row["layers"][0]["heads"][head] == pytest.approx((first + last) / 2)


def test_nothing_to_tell_is_none() -> None:
    assert retention(tiny_hybrid(DELTA, FULL), make_texts(20), batch_tokens=99) is None
    assert needles(tiny_hybrid(DELTA, FULL), [item(20, (1, 2))], batch_tokens=99) is None
    assert needles(tiny_hybrid(EVICTION, FULL), [item(20)], batch_tokens=99) is None
