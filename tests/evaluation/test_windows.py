from __future__ import annotations

import hashlib
from typing import Any

import pytest

from hybridize.errors import CheckpointError
from hybridize.evaluation.windows import document_records, make_windows, start_tokens
from hybridize.recipe.documents import Document


def test_documents_take_turns_and_windows_are_their_text(tokenizer: Any, documents: list[Document]) -> None:
    windows = make_windows(documents, tokenizer, context_tokens=64, max_windows=4)
    garden = [window for window in windows if window.source == "garden"]
    assert [window.document for window in garden] == ["garden--1.txt", "garden--2.txt"] * 2
    ids = tokenizer(documents[0].text)["input_ids"]
    assert [list(w.tokens) for w in garden if w.document == "garden--1.txt"] == [ids[:64], ids[64:128]]


def test_short_documents_fill_what_whole_windows_leave(tokenizer: Any, documents: list[Document]) -> None:
    (river, *more) = (w for w in make_windows(documents, tokenizer, context_tokens=400, max_windows=2)[::-1])
    assert river.document == "river--2.txt"
    assert 2 <= len(river.tokens) < 400
    assert [w.source for w in more] == ["river", "garden", "garden"]


def test_no_more_than_asked_of_each_source(tokenizer: Any, documents: list[Document]) -> None:
    windows = make_windows(documents, tokenizer, context_tokens=32, max_windows=3)
    assert [w.source for w in windows] == ["garden"] * 3 + ["river"] * 3


def test_a_start_token_is_in_every_window_and_counts(tokenizer: Any, documents: list[Document]) -> None:
    class Starting:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    assert start_tokens(Starting()) == [1]
    windows = make_windows(documents, Starting(), context_tokens=32, max_windows=2)
    assert all(w.tokens[0] == 1 and len(w.tokens) == 32 and w.num_prefix == 1 for w in windows)
    assert 1 not in windows[0].tokens[1:]


def test_an_end_token_that_a_tokenizer_adds_is_no_start_token() -> None:
    ending = lambda text, add_special_tokens=True: {"input_ids": [2]}  # noqa: E731
    assert start_tokens(type("T", (), {"bos_token_id": 1, "__call__": staticmethod(ending)})()) == []
    nothing = type("T", (), {"bos_token_id": None, "__call__": lambda *a, **k: {"input_ids": []}})()
    assert start_tokens(nothing) == []


def test_text_without_two_tokens_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CheckpointError, match="no held-out text") as error:
        make_windows([Document("x", "s", "d")], tokenizer, context_tokens=32, max_windows=2)
    assert error.value.hint


def test_records_carry_the_hash_of_the_text() -> None:
    (record,) = document_records([Document("déjà vu", "s", "d")])
    assert record["sha256"] == hashlib.sha256("déjà vu".encode()).hexdigest()
    assert record["characters"] == 7
