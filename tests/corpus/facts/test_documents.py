"""What documents with facts promise: lengths, distances, answers that follow from what stands before them."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.corpus.facts import make_facts, place_facts
from hybridize.corpus.facts.fact import Fact, FactDocument
from hybridize.errors import UsageError
from tests.corpus.facts.conftest import FILLER, documents_of, tokenizer_of

Documents = tuple[FactDocument, ...]


def stated(document: FactDocument) -> list[Fact]:
    return [fact for placed in document.mentions if not placed.mention.asks for fact in placed.mention.facts]


def distances(document: FactDocument) -> list[int]:
    """From every fact that is asked for to the last mention of it before, in tokens."""
    last: dict[Fact, int] = {}
    found = []
    for placed in document.mentions:
        for fact in placed.mention.facts:
            if placed.mention.asks:
                found.append(placed.token - last[fact])
            last[fact] = placed.token
    return found


@pytest.mark.parametrize("kind", ["byte-level", "sentence-piece"])
@pytest.mark.parametrize("document_tokens", [512, 777, 2048])
def test_documents_have_the_length_that_was_asked_for(kind: str, document_tokens: int) -> None:
    tokenizer = tokenizer_of(kind)
    documents = documents_of(kind, document_tokens)
    for document in documents:
        length = len(tokenizer(document.text, add_special_tokens=False)["input_ids"])
        assert 0.9 * document_tokens <= document.tokens <= document_tokens
        assert 0.85 * document_tokens <= length <= document_tokens
    total = sum(document.tokens for document in documents)
    assert total >= 60_000 > total - documents[-1].tokens


def test_lengths_vary_by_the_jitter() -> None:
    documents = place_facts(
        FILLER, tokenizer_of("byte-level"), tokens=60_000, document_tokens=2000, seed=0, length_jitter=0.5
    )
    lengths = sorted(document.tokens for document in documents)
    assert 900 <= lengths[0] < 1200
    assert 1800 < lengths[-1] <= 2000


def test_every_answer_follows_from_the_document(documents: Documents) -> None:
    for document in documents:
        values: dict[tuple[str, str], list[str]] = defaultdict(list)
        for placed in document.mentions:
            mention = placed.mention
            for fact in mention.facts:
                known = values[fact.kind.label, fact.entity]
                assert fact.value in mention.text
                assert fact.entity in mention.text
                if mention.asks:
                    assert fact.value in known
                    # All that is known of it is the answer: nothing else could have been meant.
                    assert set(known) <= {other.value for other in mention.facts}
                else:
                    known.append(fact.value)


def test_mentions_stand_where_they_are_said_to(documents: Documents) -> None:
    tokenizer = tokenizer_of("byte-level")
    for document in documents[:20]:
        for placed in document.mentions:
            assert document.text[placed.character :].startswith(placed.mention.text)
            before = len(tokenizer(document.text[: placed.character].rstrip(), add_special_tokens=False)["input_ids"])
            assert abs(before - placed.token) <= 0.05 * placed.token + 5


def test_answers_in_lines_end_their_line(documents: Documents) -> None:
    for document in documents:
        for placed in document.mentions:
            text, end = placed.mention.text, placed.character + len(placed.mention.text)
            if "\n" in text or text[-1] not in ".!?)":
                assert document.text[end : end + 1] in ("\n", "")
                assert document.text[: placed.character][-1:] in ("\n", "")


def test_most_questions_are_far_and_distances_spread_log_uniformly(documents: Documents) -> None:
    found = sorted(distance for document in documents for distance in distances(document))
    far = [distance for distance in found if distance >= 600]
    assert 0.75 < len(far) / len(found) < 0.97
    assert found[0] < 200
    assert far[-1] > 1800
    # Of all far ones, each half of the logarithms has its share; the last statements of a group stand nearest.
    middle = math.sqrt(600 * 2000)
    assert 0.3 < sum(distance < middle for distance in far) / len(far) < 0.7


def test_questions_come_one_after_the_other(documents: Documents) -> None:
    assert all(first.token <= second.token for d in documents for first, second in pairwise(d.mentions))
    asked = [[f for p in d.mentions if p.mention.asks for f in p.mention.facts] for d in documents]
    assert all(asked)
    assert any(len(set(facts)) < len(facts) for facts in asked), "no fact is asked for more than once"


def test_numbers_of_facts_spread_log_uniformly() -> None:
    counts = [len(stated(document)) for document in documents_of("byte-level", 3000, 200_000)]
    assert min(counts) >= 4
    assert max(counts) <= 24
    assert 0.25 < sum(count < math.sqrt(4 * 24) for count in counts) / len(counts) < 0.75


def test_some_documents_have_facts_that_are_hard_to_tell_apart(documents: Documents) -> None:
    alike = same_thing = several = together = 0
    for document in documents:
        facts = stated(document)
        labels = [fact.kind.label for fact in facts]
        alike += max(map(labels.count, labels)) >= 3
        entities = [fact.entity for fact in facts]
        attributes = {(fact.entity, fact.kind.label) for fact in facts}
        same_thing += len(attributes) > len(set(entities))
        several += len(attributes) < len(facts)
        together += any(len({f.entity for f in p.mention.facts}) > 1 for p in document.mentions if p.mention.asks)
    assert min(alike, same_thing, several, together) > len(documents) / 10


def test_the_seed_tells_the_documents() -> None:
    def make(seed: int, tokens: int) -> list[str]:
        return [*make_facts(FILLER, tokenizer_of("byte-level"), tokens=tokens, document_tokens=600, seed=seed)]

    assert make(1, 3000) == make(1, 3000) == make(1, 9000)[: len(make(1, 3000))]
    assert set(make(1, 9000)).isdisjoint(make(2, 9000))


@given(st.integers(512, 1500), st.integers(0, 10**6), st.floats(0, 0.9))
def test_property_any_length_and_seed_keep_the_promises(document_tokens: int, seed: int, jitter: float) -> None:
    [document] = place_facts(
        FILLER, tokenizer_of("byte-level"), tokens=1, document_tokens=document_tokens, seed=seed, length_jitter=jitter
    )
    assert max(512, (1 - jitter) * document_tokens) * 0.9 - 1 <= document.tokens <= document_tokens
    assert distances(document)
    assert min(distances(document)) >= 0


def test_what_cannot_be_made_is_refused() -> None:
    tokenizer = tokenizer_of("byte-level")
    with pytest.raises(UsageError, match="511 tokens are too short"):
        next(make_facts(FILLER, tokenizer, tokens=1, document_tokens=511, seed=0))
    with pytest.raises(UsageError, match="length_jitter is 1"):
        next(make_facts(FILLER, tokenizer, tokens=1, document_tokens=600, seed=0, length_jitter=1.0))
    with pytest.raises(UsageError, match="no text to put facts into"):
        next(make_facts(["", " \n"], tokenizer, tokens=1, document_tokens=600, seed=0))
    with pytest.raises(UsageError, match="too few sentences and lines"):
        next(make_facts(["river " * 1000], tokenizer, tokens=1, document_tokens=600, seed=0))


def test_a_document_that_has_no_room_is_refused() -> None:
    class Letters:
        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[0] * 8 * len(text) for text in texts]}

    with pytest.raises(UsageError, match="512 tokens has no room for facts"):
        next(make_facts(FILLER, Letters(), tokens=1, document_tokens=512, seed=0))
