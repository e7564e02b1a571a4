"""Packing, mixing, shuffling, and going on from any place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridize.distillation.data import DocumentStream, PackedSequences
from hybridize.distillation.token_stream import MOST_CHARACTERS, MOST_DOCUMENTS, TokenStream, document_encoder
from hybridize.errors import RecipeError
from hybridize.recipe.documents import Document
from hybridize.recipe.schema import Data
from hybridize.recipe.sources import TextSource

CLOSING = 0


def documents(prefix: int, count: int, length: int = 5) -> list[Document]:
    """Documents whose tokens are all `prefix + number`."""
    return [Document(" ".join([str(prefix + n)] * length), "s", f"{prefix}/{n}") for n in range(count)]


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [[*(int(word) for word in text.split()), CLOSING] for text in texts]


def packed(
    *sources: list[Document], weights: tuple[float, ...] = (), buffer: int = 4, num_lanes: int = 1, **kwargs: int
) -> PackedSequences:
    streams = [DocumentStream(lambda s=s: iter(s), f"7:{i}", buffer) for i, s in enumerate(sources)]
    return PackedSequences(streams, weights or (1.0,) * len(sources), encode, num_lanes=num_lanes, **kwargs)


def take(sequences: PackedSequences, count: int, length: int = 8) -> list[list[int]]:
    return [sequences.next_batch(1, length).tokens[0].tolist() for _ in range(count)]


def test_documents_are_laid_end_to_end_and_separated() -> None:
    stream = [token for row in take(packed(documents(10, 6)), 9, 8) for token in row]
    seen = []
    for start in range(0, len(stream), 6):
        chunk = stream[start : start + 6]
        assert chunk[-1] == CLOSING
        assert len(set(chunk[:-1])) == 1
        seen.append(chunk[0])
    assert sorted(seen[:6]) == list(range(10, 16))  # once each, then again in another order
    assert sorted(seen[6:12]) == list(range(10, 16))
    assert seen[:6] != seen[6:12]


def test_batch_names_its_documents() -> None:
    sequences = packed(documents(10, 6))
    batch = sequences.next_batch(2, 8)
    assert batch.tokens.shape == (2, 8)
    values = [int(value) for value in dict.fromkeys(batch.tokens.flatten().tolist()) if value != CLOSING]
    assert batch.documents == tuple(f"10/{value - 10}" for value in values)
    first_of_next = sequences.next_batch(1, 1)
    assert first_of_next.tokens.item() in (CLOSING, values[-1])


def test_neighbouring_sequences_come_from_different_documents() -> None:
    sequences = packed(documents(10, 6, length=64), num_lanes=4, buffer=6)
    batches = [sequences.next_batch(1, 16).documents for _ in range(8)]
    assert len(set(batches[:4])) == 4
    assert batches[4:] == batches[:4]  # each goes on where its lane left it


def test_weights_are_shares_of_tokens() -> None:
    long, short = documents(100, 10, length=40), documents(500, 10, length=35)
    rows = take(packed(long, short, weights=(1.0, 3.0)), 200)
    tokens = Counter(value >= 500 for row in rows for value in row if value)
    share = tokens[True] / tokens.total()
    assert 0.70 < share < 0.80


def test_seed_decides_the_order() -> None:
    source = documents(10, 20)
    streams = [DocumentStream(lambda: iter(source), seed, 20) for seed in ("1:0", "1:0", "2:0")]
    orders = [[stream.next().id for _ in range(20)] for stream in streams]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(document.id for document in source)


@given(
    before=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=6),
    buffer=st.integers(1, 9),
    lanes=st.integers(1, 4),
    weight=st.floats(0.1, 5.0),
)
def test_going_on_gives_what_would_have_come(
    before: list[tuple[int, int]], buffer: int, lanes: int, weight: float
) -> None:
    def make() -> PackedSequences:
        return packed(documents(10, 5), documents(500, 3, 11), weights=(1.0, weight), buffer=buffer, num_lanes=lanes)

    straight, resumed = make(), make()
    for rows, length in before:
        straight.next_batch(rows, length)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for length in (7, 13, 64):
        one, other = straight.next_batch(2, length), resumed.next_batch(2, length)
        assert torch.equal(one.tokens, other.tokens)
        assert one.documents == other.documents
        assert (one.bounds is None) == (other.bounds is None)
        assert one.bounds is None or torch.equal(one.bounds, other.bounds)
    assert straight.state_dict() == resumed.state_dict()


def test_processes_share_the_sequences_out() -> None:
    alone = take(packed(documents(10, 6)), 6)
    parts = [take(packed(documents(10, 6), rank=rank, num_processes=2), 3) for rank in range(2)]
    assert [row for pair in zip(*parts, strict=True) for row in pair] == alone


@pytest.mark.parametrize(("count", "num_processes"), [(2, 2), (4, 2), (3, 3), (2, 1)])
def test_micro_batches_are_the_same_whoever_takes_them(count: int, num_processes: int) -> None:
    alone = packed(documents(10, 6), num_lanes=3)
    several = [packed(documents(10, 6), num_lanes=3, rank=r, num_processes=num_processes) for r in range(num_processes)]
    for _ in range(2):
        expected = alone.next_batches(count, 3, 8)
        shared = [process.next_batches(count // num_processes, 3, 8) for process in several]
        found = [batch for micro_batches in zip(*shared, strict=True) for batch in micro_batches]
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert one.documents == other.documents
            assert one.bounds is not None
            assert torch.equal(one.bounds, other.bounds)
    assert [process.state_dict() for process in several] == [alone.state_dict()] * num_processes


def test_any_number_of_processes_goes_on_from_a_place() -> None:
    def make(rank: int = 0, num_processes: int = 1) -> PackedSequences:
        sources = documents(10, 5), documents(500, 3, 11)
        return packed(*sources, num_lanes=3, rank=rank, num_processes=num_processes)

    def together(processes: list[PackedSequences], rows: int) -> torch.Tensor:
        parts = [process.next_batch(rows, 8).tokens for process in processes]
        return torch.stack(parts, dim=1).flatten(0, 1)

    alone, pair = make(), [make(rank, 2) for rank in range(2)]
    for _ in range(3):
        assert torch.equal(together(pair, 2), alone.next_batch(4, 8).tokens)
    place = json.loads(json.dumps(pair[0].state_dict()))
    assert place == pair[1].state_dict() == alone.state_dict()
    four = [make(rank, 4) for rank in range(4)]
    for process in four:
        process.load_state_dict(place)
    assert torch.equal(together(four, 1), alone.next_batch(4, 8).tokens)


def test_bounds_are_those_of_the_documents_in_the_rows() -> None:
    batch = packed(documents(10, 6)).next_batch(3, 8)  # documents of 6 tokens
    assert batch.bounds is not None
    assert batch.bounds.dtype == torch.int32
    assert batch.bounds.tolist() == [0, 6, 8, 12, 16, 18, 24]
    inputs = batch.model_inputs()
    assert torch.equal(inputs["input_ids"], batch.tokens.reshape(1, 24))
    assert torch.equal(inputs["cu_seqlens"], batch.bounds)
    lengths = batch.bounds.diff().tolist()
    assert inputs["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    ends = [bound - 1 for bound in batch.bounds.tolist()[1:]]
    mask = batch.labels_mask
    assert mask is not None
    assert mask.shape == batch.tokens.shape
    assert mask.flatten().tolist() == [token not in ends for token in range(24)]
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)
    assert torch.equal(moved.bounds, batch.bounds)
    assert moved.documents == batch.documents


@pytest.mark.parametrize(("length", "boundaries"), [(6, True), (3, True), (8, False)])
def test_rows_without_a_boundary_inside_are_texts(length: int, boundaries: bool) -> None:
    batch = packed(documents(10, 6), document_boundaries=boundaries).next_batch(4, length)
    assert batch.bounds is None
    assert batch.labels_mask is None
    assert batch.model_inputs().keys() == {"input_ids"}
    assert batch.to("cpu").model_inputs()["input_ids"].shape == (4, length)


def test_documents_are_tokenised_several_at_a_time_and_counted_one_at_a_time() -> None:
    asked: list[int] = []

    def counting(texts: Sequence[str]) -> list[list[int]]:
        asked.append(len(texts))
        return encode(texts)

    def tokens() -> TokenStream:
        return TokenStream(DocumentStream(lambda: iter(documents(10, 150)), "7", 4), counting)

    stream, found = tokens(), []
    for number in range(1, 131):
        found.append(stream.next())
        assert stream.state_dict() == {"epoch": 0, "drawn": number}
    assert asked == [MOST_DOCUMENTS] * 3
    again = tokens()
    again.load_state_dict({"epoch": 0, "drawn": 70})
    assert [again.next() for _ in range(60)] == found[70:]
    long = TokenStream(DocumentStream(lambda: iter(documents(1, 9, length=MOST_CHARACTERS // 5)), "7", 1), counting)
    del asked[:]
    long.next()
    assert asked == [3]


def test_a_fault_comes_after_the_documents_before_it() -> None:
    def broken() -> Iterator[Document]:
        yield from documents(10, 2)
        raise RecipeError("The file is damaged.")

    stream = TokenStream(DocumentStream(broken, "7", 1), encode)
    assert {stream.next()[0], stream.next()[0]} == {"10/0", "10/1"}
    for _ in range(2):
        with pytest.raises(RecipeError, match="damaged"):
            stream.next()


def test_no_training_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text")
    data = Data(train=(TextSource("a.txt"),), held_out=(TextSource("a.txt"),))
    tokenizer = SimpleNamespace(eos_token_id=2, bos_token_id=None)
    tokenizer_call = type("Tokenizer", (), {"__call__": lambda self, text, **_: SimpleNamespace(input_ids=[5])})()
    vars(tokenizer_call).update(vars(tokenizer))
    sequences = PackedSequences.from_recipe(data, tokenizer_call, base=tmp_path, seed=0)
    with pytest.raises(RecipeError, match="held out"):
        sequences.next_batch(1, 4)


def test_encoder_opens_as_the_tokenizer_does_and_closes_always() -> None:
    class Tokenizer:
        bos_token_id, eos_token_id = 1, 2

        def __init__(self, opens: bool) -> None:
            self.opens = opens

        def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: object) -> SimpleNamespace:
            opening = [1] if self.opens and add_special_tokens else []
            ids = [opening + [ord(character) for character in each] for each in ([text] if text == "a" else text)]
            return SimpleNamespace(input_ids=ids[0] if text == "a" else ids)

    assert document_encoder(Tokenizer(True))(["ab", "", "c"]) == [[1, 97, 98, 2], [1, 2], [1, 99, 2]]
    assert document_encoder(Tokenizer(False))(["ab"]) == [[97, 98, 2]]
    without_closing = Tokenizer(False)
    without_closing.eos_token_id = None  # type: ignore[assignment]
    with pytest.raises(RecipeError, match="end-of-sequence"):
        document_encoder(without_closing)
