"""Sequences of one document each."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.distillation.data import DocumentStream
from hybridize.distillation.layer_choice import passages as module
from hybridize.distillation.layer_choice.passages import Passage, passages
from hybridize.errors import RecipeError, UsageError
from hybridize.recipe.documents import Document


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [[ord(character) for character in text] + [0] for text in texts]


def documents(lengths: Sequence[int], name: str = "a") -> list[Document]:
    """Texts of which every piece is another, as far as that goes."""
    texts = ["".join(chr(100 + (31 * number + place) % 5000) for place in range(n)) for number, n in enumerate(lengths)]
    return [Document(text, name, f"{name}#{number}") for number, text in enumerate(texts)]


def stream(found: Sequence[Document], buffer: int = 3, seed: str = "0") -> DocumentStream:
    return DocumentStream(lambda: iter(found), seed, buffer)


def take(lengths: Sequence[int], num_sequences: int, sequence_tokens: int, seed: str = "0") -> list[Passage]:
    streams = [stream(documents(lengths), seed=seed)]
    return passages(streams, [1.0], encode, num_sequences=num_sequences, sequence_tokens=sequence_tokens)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    wanted=st.integers(1, 10),
    sequence_tokens=st.integers(2, 25),
)
def test_passages_are_pieces_of_long_documents(lengths: list[int], wanted: int, sequence_tokens: int) -> None:
    there = sum((length + 1) // sequence_tokens for length in lengths)
    long = sum(length + 1 >= sequence_tokens for length in lengths)
    if there < wanted:
        with pytest.raises(UsageError, match=f"gives {there} sequences of {sequence_tokens} ") as refused:
            take(lengths, wanted, sequence_tokens)
        advised = re.match("[0-9]+", refused.value.hint)
        most = max((n for n in range(2, 62) if sum((length + 1) // n for length in lengths) >= wanted), default=None)
        assert most == (int(advised[0]) if advised else None)
        return
    found = take(lengths, wanted, sequence_tokens)
    assert len(found) == wanted
    for passage in found:
        whole = encode([passage.document.text])[0]
        end = passage.first_token + sequence_tokens
        assert list(passage.tokens) == whole[passage.first_token : end]
        assert len(passage.tokens) == sequence_tokens
    assert len({(passage.document.id, passage.first_token) for passage in found}) == wanted
    # None gives a further one before each has given its first.
    assert len({passage.document.id for passage in found[:long]}) == min(long, wanted)
    assert take(lengths, wanted, sequence_tokens) == found


def test_the_seed_draws_others() -> None:
    chosen = {tuple(passage.document.id for passage in take([30] * 20, 2, 20, seed=str(seed))) for seed in range(5)}
    assert len(chosen) > 1


def test_sources_give_by_their_weights() -> None:
    streams = [stream(documents([30] * 20, name)) for name in "ab"]
    found = passages(streams, [3.0, 1.0], encode, num_sequences=8, sequence_tokens=20)
    assert sorted(passage.document.source_name for passage in found) == ["a"] * 6 + ["b"] * 2


def test_a_source_of_short_documents_leaves_it_to_the_others() -> None:
    streams = [stream(documents([5] * 20, "a")), stream(documents([30] * 4, "b"))]
    found = passages(streams, [1.0, 1.0], encode, num_sequences=4, sequence_tokens=20)
    assert {passage.document.source_name for passage in found} == {"b"}


def test_a_source_without_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CHARACTERS", 1000)
    short = documents([5])[0]

    def without_end() -> object:
        while True:
            yield short

    endless = DocumentStream(without_end, "0", 1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="gives 0 sequences"):
        passages([endless], [1.0], encode, num_sequences=1, sequence_tokens=20)


def test_no_document_at_all() -> None:
    with pytest.raises(RecipeError, match="held out"):
        passages([stream([])], [1.0], encode, num_sequences=1, sequence_tokens=20)
