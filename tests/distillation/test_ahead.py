"""Batches made a step ahead: the same ones, with the place of the step that was taken."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from hybridize.distillation.ahead import Ahead
from hybridize.distillation.data import Batch, DocumentStream, PackedSequences
from hybridize.distillation.schedule import Shape
from hybridize.errors import CheckpointError
from hybridize.recipe.documents import Document

STEPS = [(Shape(2, 8), 1), (Shape(2, 8), 3), (Shape(1, 16), 2), (Shape(1, 4), 1)]


def documents() -> Iterator[Document]:
    for number in range(40):
        yield Document(f"{number:04d}", "s", f"d#{number}")


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [[*map(ord, text), 1] for text in texts]


def stream() -> PackedSequences:
    return PackedSequences([DocumentStream(documents, "0", 4)], [1.0], encode, num_lanes=2)


def test_the_batches_and_places_are_those_of_the_stream() -> None:
    straight, followed = stream(), stream()
    with Ahead(followed) as ahead:
        for step, following in zip(STEPS, [*STEPS[1:], None], strict=True):
            fetched = ahead.take(*step, following)
            shape, count = step
            expected = straight.next_batches(count, shape.sequences, shape.tokens)
            assert len(fetched.batches) == count
            for found, wanted in zip(fetched.batches, expected, strict=True):
                assert torch.equal(found.tokens, wanted.tokens)
                assert found.documents == wanted.documents
            # The stream itself may be a step further.
            assert fetched.place == straight.state_dict()


def test_a_saved_place_leads_to_the_next_step() -> None:
    with Ahead(stream()) as ahead:
        place = ahead.take(*STEPS[0], STEPS[1]).place
        expected = ahead.take(*STEPS[1], None)
    resumed = stream()
    resumed.load_state_dict(place)
    with Ahead(resumed) as ahead:
        found = ahead.take(*STEPS[1], None)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found.batches, expected.batches, strict=True))
    assert found.place == expected.place


def test_what_was_not_announced_is_refused() -> None:
    with Ahead(stream()) as ahead:
        ahead.take(*STEPS[0], STEPS[1])
        with pytest.raises(ValueError, match="announced"):
            ahead.take(*STEPS[2], None)


def test_a_batch_is_made_while_nobody_waits_for_it() -> None:
    made = threading.Event()

    class Watched(PackedSequences):
        def next_batches(self, count: int, num_sequences: int, sequence_tokens: int) -> tuple[Batch, ...]:
            if threading.current_thread() is not threading.main_thread() and sequence_tokens == 16:
                made.set()
            return super().next_batches(count, num_sequences, sequence_tokens)

    watched = Watched([DocumentStream(documents, "0", 4)], [1.0], encode)
    with Ahead(watched) as ahead:
        ahead.take(Shape(1, 8), 1, (Shape(1, 16), 1))
        assert made.wait(timeout=10)


def test_an_error_comes_out_with_the_step_that_needs_the_text() -> None:
    def broken() -> Iterator[Document]:
        yield Document("0123456", "s", "d#0")
        raise CheckpointError("The file is not UTF-8.", where="d")

    sequences = PackedSequences([DocumentStream(broken, "0", 1)], [1.0], encode, num_lanes=1)
    with Ahead(sequences) as ahead:
        ahead.take(Shape(1, 8), 1, (Shape(1, 8), 1))  # the next one fails in the thread; this one is whole
        with pytest.raises(CheckpointError, match="UTF-8"):
            ahead.take(Shape(1, 8), 1, None)


def take_and_fail() -> None:
    with Ahead(stream()) as ahead:
        ahead.take(*STEPS[0], STEPS[1])
        raise KeyError("the step failed")


def test_the_end_does_not_leave_a_thread_behind() -> None:
    before = threading.active_count()
    with Ahead(stream()) as ahead:
        ahead.take(*STEPS[0], STEPS[1])  # and nobody takes what was announced
    assert threading.active_count() == before
    with pytest.raises(KeyError):
        take_and_fail()
    assert threading.active_count() == before
