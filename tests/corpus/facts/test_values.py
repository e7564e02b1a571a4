"""Values: what they look like, and that none is a number of seven digits."""

from __future__ import annotations

import random
import re

import pytest

from hybridize.corpus.facts.names import NAMES
from hybridize.corpus.facts.values import SEVEN_DIGITS, VALUES, draw_value


def many(name: str, count: int = 2000) -> list[str]:
    rng = random.Random(name)
    return [draw_value(VALUES[name], rng) for _ in range(count)]


@pytest.mark.parametrize("name", VALUES)
def test_no_value_is_a_number_of_seven_digits(name: str) -> None:
    for value in many(name):
        assert not re.search(r"(?<!\d)\d{7}(?!\d)", value)
        if re.fullmatch(r"\D*\d[\d ,.:/'_-]*\D*", value):
            assert sum(sign.isdigit() for sign in value) != 7, value


def test_a_draw_of_seven_digits_is_drawn_again() -> None:
    rng = random.Random(0)
    assert any(SEVEN_DIGITS.search(VALUES["address"](rng)) for _ in range(200)), "nothing to draw again"
    drawn = iter(("1234567", "12.34.5.67", "12345678"))
    assert draw_value(lambda _: next(drawn), rng) == "12345678"


@pytest.mark.parametrize("text", ["1234567", "a1234567b", "1,234,567", "123 4567", "x 12-34-567.", "$12,345.67"])
def test_seven_digits_are_seen(text: str) -> None:
    assert SEVEN_DIGITS.search(text)


@pytest.mark.parametrize("text", ["123456", "12345678", "1,234,5678", "12 345 678", "1234 and 567", "123  4567"])
def test_other_numbers_are_not_taken_for_seven_digits(text: str) -> None:
    assert not SEVEN_DIGITS.search(text)


def test_numbers_have_every_other_length() -> None:
    lengths = {sum(sign.isdigit() for sign in value) for value in many("number")}
    assert lengths == {2, 3, 4, 5, 6, 8, 9, 10, 11, 12}
    assert {sign for value in many("number") for sign in value if not sign.isdigit()} >= {",", " ", "-"}


def test_hexadecimal_strings_have_4_to_12_digits() -> None:
    digits = [value.removeprefix("0x") for value in many("hexadecimal")]
    assert {len(value) for value in digits} == set(range(4, 13))
    assert all(re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", value) for value in digits)


def test_phrases_have_2_to_4_words() -> None:
    assert {len(value.split()) for value in many("phrase")} == {2, 3, 4}


@pytest.mark.parametrize("table", [VALUES, NAMES], ids=["values", "names"])
def test_values_and_names_stand_in_a_line_without_marks_of_their_own(table: dict[str, object]) -> None:
    rng = random.Random(1)
    for draw in table.values():
        for _ in range(300):
            text = draw(rng)  # type: ignore[operator]
            assert text == text.strip()
            assert text
            assert not re.search(r"[\n\t|{}]", text)


def test_names_are_many() -> None:
    rng = random.Random(0)
    few = {name: len({draw(rng) for _ in range(500)}) for name, draw in NAMES.items()}
    assert {name: count for name, count in few.items() if count < 250} == {}
