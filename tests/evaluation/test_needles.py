from __future__ import annotations

import re
import uuid
from dataclasses import replace
from typing import Any

import pytest

from hybridize.errors import CheckpointError, UsageError
from hybridize.evaluation.generation import prompt_ids
from hybridize.evaluation.needles import KINDS, NOISE, Needle, make_needle
from hybridize.evaluation.recall import make_questions
from hybridize.recipe.documents import Document
from hybridize.recipe.probes import RecallProbe


@pytest.fixture
def make(tokenizer: Any, documents: list[Document]) -> Any:
    def make(kind: str = "niah_single_2", tokens: int = 600, depth: float = 0.5, sample: int = 0, seed: int = 0):
        return make_needle(
            kind,
            tokens,
            depth,
            sample,
            seed=seed,
            prose=[document.text for document in documents],
            count=lambda text: len(prompt_ids(tokenizer, text)),
        )

    return make


def haystack(needle: Needle) -> tuple[str, str]:
    """The text before and after the needle."""
    sentence = re.search(rf"One of the special magic \w+ for {needle.key} is: {needle.value}\.", needle.prompt)
    assert sentence is not None
    body = needle.prompt[: needle.prompt.rindex("\nWhat is")].split("\n", 1)[1]
    before, after = body.split(sentence[0])
    return before.strip(), after.strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [450, 777, 1500])
def test_a_prompt_fills_its_length_to_the_last_word(make: Any, tokenizer: Any, kind: str, tokens: int) -> None:
    for depth in (0.0, 0.4, 1.0):
        needle = make(kind, tokens, depth)
        assert needle.prompt_tokens == len(prompt_ids(tokenizer, needle.prompt))
        assert tokens - 12 < needle.prompt_tokens <= tokens


def test_the_length_is_exact_with_a_token_a_word(documents: list[Document]) -> None:
    for tokens in (200, 201, 299):
        needle = make_needle(
            "niah_single_2", tokens, 0.5, 0, seed=0, prose=[documents[0].text], count=lambda text: len(text.split())
        )
        assert needle.prompt_tokens == tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_needle_stands_at_its_depth_between_sentences(make: Any, kind: str, depth: float) -> None:
    needle = make(kind, 1500, depth)
    before, after = haystack(needle)
    num_before, num_after = len(before.split()), len(after.split())
    assert needle.position == pytest.approx(num_before / (num_before + num_after))
    assert abs(num_before - depth * (num_before + num_after)) <= 15  # the longest sentence
    assert not before or before.endswith(".") or depth == 1.0
    if depth == 1.0:
        assert after == ""


def test_values_are_what_the_kind_says_and_occur_once(make: Any) -> None:
    for kind in KINDS:
        needle = make(kind)
        assert needle.prompt.count(needle.value) == 1
        assert needle.prompt.endswith(f"for {needle.key} mentioned in the provided text is")
        if kind == "niah_single_3":
            assert str(uuid.UUID(needle.value)) == needle.value
        else:
            assert re.fullmatch(r"[1-9]\d{6}", needle.value)
        assert re.fullmatch(r"[a-z]+-[a-z]+", needle.key)


def test_noise_is_noise_and_prose_is_prose(make: Any) -> None:
    before, _ = haystack(make("niah_single_1", depth=0.5))
    assert NOISE.startswith(before[:40])
    before, _ = haystack(make("niah_single_2", depth=0.5))
    assert NOISE[:20] not in before


def test_the_same_seed_gives_the_same_question(make: Any) -> None:
    assert make(seed=3) == make(seed=3)
    different = [make(seed=4), make(sample=1, seed=3), make(depth=0.6, seed=3), make("niah_single_1", seed=3)]
    assert len({needle.value for needle in (*different, make(seed=3))}) == 5


def test_short_prose_is_repeated(tokenizer: Any) -> None:
    needle = make_needle(
        "niah_single_2",
        500,
        0.5,
        0,
        seed=0,
        prose=["Only one sentence here."],
        count=lambda text: len(prompt_ids(tokenizer, text)),
    )
    assert needle.prompt.count("Only one sentence here.") > 5


def test_a_length_without_room_is_refused(make: Any) -> None:
    with pytest.raises(UsageError, match="no room") as error:
        make(tokens=60)
    assert "evaluate.recall.lengths" in error.value.where


def test_prose_kinds_need_prose(tokenizer: Any) -> None:
    count = lambda text: len(text.split())  # noqa: E731
    with pytest.raises(CheckpointError, match="held-out prose"):
        make_needle("niah_single_3", 500, 0.5, 0, seed=0, prose=[" "], count=count)
    assert make_needle("niah_single_1", 500, 0.5, 0, seed=0, prose=[], count=count).prompt_tokens == 500


def test_questions_come_in_the_order_of_the_grid(tokenizer: Any, documents: list[Document]) -> None:
    settings = RecallProbe(kinds=("niah_single_1", "niah_single_2"), lengths=(450, 500), depths=(0.1, 0.9), samples=2)
    texts = [document.text for document in documents]
    questions = make_questions(settings, tokenizer, texts, seed=1)
    assert len(questions) == 16
    order = [(needle.kind, needle.tokens, needle.depth) for needle in questions]
    assert order == sorted(order)
    assert questions == make_questions(settings, tokenizer, texts, seed=1)
    assert make_questions(replace(settings, lengths=(500,)), tokenizer, texts, seed=1) == [
        needle for needle in questions if needle.tokens == 500
    ]
