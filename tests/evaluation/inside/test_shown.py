"""A text token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridize.evaluation.inside.held import held_after
from hybridize.evaluation.inside.shown import bit_mask, pieces, shown
from hybridize.evaluation.windows import Window
from tests.evaluation.conftest import make_prose
from tests.evaluation.inside.hybrids import DELTA, EVICTION, FULL, make_texts, tiny_hybrid

with_one_tokenizer = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@given(text=st.text(min_size=1, max_size=30), cut=st.integers(0, 5))
@with_one_tokenizer
def test_pieces_joined_are_the_text(tokenizer: Any, text: str, cut: int) -> None:
    """Of any text, also cut inside a character."""
    tokens = tokenizer(text)["input_ids"]
    tokens = tokens[: max(1, len(tokens) - cut)]
    found = pieces(tokenizer, tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(tokenizer: Any) -> None:
    tokens = tokenizer("a 🙂 b")["input_ids"]
    assert len(tokens) > 5
    found = pieces(tokenizer, tokens)
    assert [piece for piece in found if piece] == ["a", " ", "🙂", " ", "b"]
    assert found[-3:] == ["🙂", " ", "b"]


def test_start_tokens_have_a_piece(tokenizer: Any) -> None:
    assert pieces(tokenizer, [1, *tokenizer("the")["input_ids"]])[0] == "<s>"


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_bit_mask_says_which(held: list[bool]) -> None:
    mask = bit_mask(torch.tensor(held))
    assert len(mask) == 2 * -(-len(held) // 8)
    bits = [bool(byte >> (7 - bit) & 1) for byte in bytes.fromhex(mask) for bit in range(8)]
    assert bits[: len(held)] == held
    assert not any(bits[len(held) :])


def test_the_first_text_that_is_long_enough_is_shown(tokenizer: Any) -> None:
    hybrid = tiny_hybrid(FULL, EVICTION, {**EVICTION, "window_tokens": 11})
    ids = tuple(tokenizer(make_prose(40, seed=2))["input_ids"])
    windows = [Window(ids[:20], "s", "short"), Window(ids[:50], "s", "long"), Window(ids[50:130], "s", "longer")]
    row = shown(hybrid, tokenizer, windows, shown_tokens=43)
    assert row is not None
    assert "".join(row["pieces"]) == tokenizer.decode(ids[:43])
    assert row["window_tokens"] == 11
    ((_, held),) = held_after(hybrid, [ids[:43]], batch_tokens=43)
    assert row["layers"] == [{"index": i, "heads": [bit_mask(head) for head in held[i]]} for i in (1, 2)]
    assert any(int(head, 16) != int("1" * 43 + "0" * 5, 2) for head in row["layers"][0]["heads"])
    longest = shown(hybrid, tokenizer, windows, shown_tokens=999)
    assert longest is not None
    assert len(longest["pieces"]) == 80


@pytest.mark.parametrize("mixer", [DELTA, FULL])
def test_nothing_to_show_is_none(tokenizer: Any, mixer: dict[str, Any]) -> None:
    assert shown(tiny_hybrid(FULL, mixer), tokenizer, make_texts(20), shown_tokens=9) is None
