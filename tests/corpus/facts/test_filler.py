"""Running text comes from what was given, in whole sentences and lines, every document in its turn."""

from __future__ import annotations

import random
import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from hybridize.corpus.facts.documents import MONOTONOUS_SHARE
from hybridize.corpus.facts.fact import FactDocument
from hybridize.corpus.facts.filler import LONGEST_PIECE, LONGEST_UNIT, Filler, units
from tests.corpus.facts.conftest import FILLER, tokenizer_of

SENTENCES = {sentence for text in FILLER for sentence in re.findall(r"In chapter[^.]*\.", text)}


def source_of(text: str) -> int:
    return int(re.search(r"chapter (\d+)", text)[1])  # type: ignore[index]


def running_text(document: FactDocument) -> list[str]:
    """The sentences between the mentions."""
    rest, end = [], 0
    for placed in document.mentions:
        rest.append(document.text[end : placed.character])
        end = placed.character + len(placed.mention.text)
    rest.append(document.text[end:])
    found = re.split(r"(?<=\.)\s+", "\n".join(rest).strip())
    return [sentence.strip() for sentence in found if sentence.strip()]


def test_what_is_no_mention_is_whole_sentences_of_the_filler(documents: tuple[FactDocument, ...]) -> None:
    for document in documents[:30]:
        assert set(running_text(document)) <= SENTENCES


def test_most_documents_go_through_the_filler_and_some_repeat_a_piece_of_it(
    documents: tuple[FactDocument, ...],
) -> None:
    repeating = 0
    for document in documents:
        found = running_text(document)
        often = sum(count for _, count in Counter(found).most_common(8))
        if often > 0.5 * len(found) and len(found) > 20:
            repeating += 1
        else:
            assert len({source_of(sentence) for sentence in found}) >= 3
    expected = MONOTONOUS_SHARE * len(documents)
    assert abs(repeating - expected) < 4 * (expected * (1 - MONOTONOUS_SHARE)) ** 0.5


def test_pieces_are_successive_and_of_a_few_hundred_tokens() -> None:
    filler = Filler(FILLER, tokenizer_of("byte-level"), random.Random(0))
    for _ in range(100):
        piece = filler.piece(10_000)
        assert sum(unit.tokens for unit in piece) <= LONGEST_PIECE
        assert piece[0].text.startswith("\n\n")
        numbers = [int(re.search(r"verse (\d+)", unit.text)[1]) for unit in piece]  # type: ignore[index]
        assert numbers == list(range(numbers[0], numbers[0] + len(piece)))
        assert {source_of(unit.text) for unit in piece} == {source_of(piece[0].text)}


def test_every_document_has_its_turn_before_one_comes_again() -> None:
    filler = Filler(FILLER, tokenizer_of("byte-level"), random.Random(0))
    turns = [[source_of(filler.piece(200)[0].text) for _ in FILLER] for _ in range(2)]
    assert [sorted(turn) for turn in turns] == [list(range(len(FILLER)))] * 2
    assert turns[0] != turns[1]


def test_a_piece_fits() -> None:
    filler = Filler(FILLER, tokenizer_of("byte-level"), random.Random(0))
    tokenizer = tokenizer_of("byte-level")
    for most in (30, 31, 40, 100):
        piece = filler.piece(most)
        assert 0 < sum(unit.tokens for unit in piece) <= most
        assert [len(tokenizer(unit.text)["input_ids"]) for unit in piece] == [unit.tokens for unit in piece]


def test_units_of_a_text() -> None:
    text = "  One. Two?\nThree (four) five.\n \nsix: 3.5 seven\n\n\n    indented\nmore\n"
    assert units(text) == [
        "\n\n  One.",
        " Two?",
        "\nThree (four) five.",
        "\n\nsix: 3.5 seven",
        "\n\n    indented\nmore",
    ]


def test_long_sentences_come_line_by_line() -> None:
    line = "word " * 100
    assert units(f"{line}\n{line}\nend") == [f"\n\n{line.strip()}", f"\n{line.strip()}", "\nend"]


@given(st.text(alphabet="aB.!? \n\t", max_size=200))
def test_property_units_are_the_text_but_for_white_space(text: str) -> None:
    found = units(text)
    assert "".join(found).split() == text.split()
    assert all(re.match(r"\n\n|\n| ", unit) and unit.strip() and unit == unit.rstrip() for unit in found)


def test_units_that_are_too_long_are_left_out() -> None:
    text = f"First here. {'A' * LONGEST_UNIT}. Second here. Third here."
    filler = Filler([text], tokenizer_of("byte-level"), random.Random(0))
    assert [unit.text for unit in filler.piece(400)] == ["\n\nFirst here."]
