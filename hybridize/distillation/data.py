"""Training sequences: documents of weighted sources, shuffled, tokenised and packed; resumable bit for bit.

Documents pass a seeded shuffle buffer, are tokenised, closed by the end-of-sequence token and laid end to end;
sequences are cut from that stream. Several such streams (lanes) take turns, so that neighbouring sequences come from
different documents however long these are. When a source is used up it begins again in a new order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.distillation.token_stream import Encode, TokenStream, document_encoder
from hybridize.errors import RecipeError
from hybridize.mixers.parts.documents import document_positions
from hybridize.recipe.documents import Document, training_documents
from hybridize.recipe.schema import Data

NUM_LANES = 8


@dataclass(frozen=True)
class Batch:
    """Sequences of one micro-batch.

    Attributes:
        tokens: [B, T] int64.
        documents: ids of the documents in it, for messages.
        bounds: [N + 1] int32, where the documents of the rows laid end to end begin, from 0, and the last ends, B·T;
            the edges of the rows are among them. None: every row is one text, because no document begins inside a row
            or because its documents are read as one.
        on_host: the same as it was before it went to a GPU, for whoever would have to wait for that; or None.
    """

    tokens: Tensor
    documents: tuple[str, ...]
    bounds: Tensor | None = None
    on_host: Batch | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device. The host does not wait for the copy."""
        device = torch.device(device)
        bounds = None if self.bounds is None else _copied(self.bounds, device)
        return Batch(_copied(self.tokens, device), self.documents, bounds, self if device.type == "cuda" else None)

    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments of a model's forward pass: the rows, or all documents in one row [1, B·T] with their bounds."""
        if self.bounds is None:
            return {"input_ids": self.tokens}
        positions = document_positions(self.bounds, self.tokens.numel())
        return {"input_ids": self.tokens.view(1, -1), "position_ids": positions, "cu_seqlens": self.bounds}

    @property
    def labels_mask(self) -> Tensor | None:
        """[B, T] bool, False where a document ends: the next token, if the row has one, is another document's.

        None where the rows are texts: every token but the last of a row has its next token.
        """
        if self.bounds is None:
            return None
        mask = torch.ones(self.tokens.numel(), dtype=torch.bool, device=self.bounds.device)
        return mask.index_fill(0, self.bounds[1:].long() - 1, False).view(self.tokens.shape)


def _copied(x: Tensor, device: torch.device) -> Tensor:
    # Only from pinned memory is a copy to a GPU asynchronous.
    x = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return x.to(device, non_blocking=True)


class DocumentStream:
    """The documents of one source, again and again, in a new order each time.

    Args:
        read: begins the source anew.
        seed: of this source's order.
        buffer_size: documents to draw the next one from.
    """

    def __init__(self, read: Callable[[], Iterator[Document]], seed: str, buffer_size: int) -> None:
        self.read = read
        self.seed = seed
        self.buffer_size = max(buffer_size, 1)
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Starts the source for the `epoch`-th time."""
        self.epoch = epoch
        self.drawn = 0
        """Documents taken in this epoch."""
        self._random = random.Random(f"{self.seed}:{epoch}")
        self._documents = self.read()
        self._buffer: list[Document] = []

    def next(self) -> Document:
        """The next document.

        Raises:
            RecipeError: the source has no training document.
        """
        document = self._draw()
        if document is None:
            if self.drawn == 0:
                hint = "Lower held_out_share, or give text that the recipe's `held_out` does not have."
                raise RecipeError("Every document of a training source is held out.", where="data.train", hint=hint)
            self.begin(self.epoch + 1)
            document = self._draw()
            assert document is not None  # the source had documents a moment ago
        return document

    def _draw(self) -> Document | None:
        while len(self._buffer) < self.buffer_size:
            document = next(self._documents, None)
            if document is None:
                break
            self._buffer.append(document)
        if not self._buffer:
            return None
        # The last one takes the free place, so that drawing is O(1).
        index = self._random.randrange(len(self._buffer))
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        self.drawn += 1
        return self._buffer.pop()

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Reads the epoch again up to the place; nothing is tokenised."""
        self.begin(state["epoch"])
        for _ in range(state["drawn"]):
            self._draw()


class Lane:
    """Packed tokens that were not handed out yet, and the documents that they are of."""

    def __init__(self, tokens: list[int], documents: list[tuple[str, int]]) -> None:
        self.tokens = tokens
        self.documents = documents
        """(id, tokens of it in `tokens`), in order."""

    def append(self, identity: str, tokens: list[int]) -> None:
        self.tokens += tokens
        self.documents.append((identity, len(tokens)))

    def take(self, count: int) -> tuple[list[int], list[tuple[str, int]]]:
        """The first `count` tokens, and their documents: (id, tokens of it among them), in order."""
        tokens, self.tokens = self.tokens[:count], self.tokens[count:]
        taken: list[tuple[str, int]] = []
        while count > 0:
            identity, available = self.documents.pop(0)
            taken.append((identity, min(available, count)))
            if available > count:
                self.documents.insert(0, (identity, available - count))
            count -= available
        return tokens, taken


class PackedSequences:
    """The stream of training sequences.

    Sources are mixed by tokens: the next document comes from the source that is furthest behind its weight.

    Args:
        streams: one a source. weights: their shares.
        encode: texts -> token ids of each, with the separator.
        num_lanes: streams of packed tokens that take turns.
        rank, num_processes: of `num_processes` consecutive sequences this process takes the `rank`-th. All processes
            walk over all sequences, so that their places are the same and any number of them can go on from one.
        document_boundaries: batches tell where documents begin; else a row is read as one text.
    """

    def __init__(
        self,
        streams: Sequence[DocumentStream],
        weights: Sequence[float],
        encode: Encode,
        *,
        num_lanes: int = NUM_LANES,
        rank: int = 0,
        num_processes: int = 1,
        document_boundaries: bool = True,
    ) -> None:
        self.streams = tuple(TokenStream(stream, encode) for stream in streams)
        self.weights = tuple(weights)
        self.rank, self.num_processes = rank, num_processes
        self.document_boundaries = document_boundaries
        self.tokens_of_source = [0] * len(self.streams)
        self._lanes = [Lane([], []) for _ in range(num_lanes)]
        self._turn = 0

    @classmethod
    def from_recipe(
        cls, data: Data, tokenizer: Any, *, base: Path, seed: int, offline: bool = False, rank: int = 0, num: int = 1
    ) -> PackedSequences:
        """The training sources of a recipe, without what is held out."""
        streams = [
            DocumentStream(
                lambda source=source: training_documents(source, data, base, offline=offline),  # type: ignore[misc]
                f"{seed}:{index}",
                data.shuffle_documents,
            )
            for index, source in enumerate(data.train)
        ]
        weights = [source.weight for source in data.train]
        return cls(
            streams,
            weights,
            document_encoder(tokenizer),
            rank=rank,
            num_processes=num,
            document_boundaries=data.document_boundaries,
        )

    def next_batches(self, count: int, num_sequences: int, sequence_tokens: int) -> tuple[Batch, ...]:
        """The next `count` micro-batches [num_sequences, sequence_tokens] of this process.

        Those of all processes take turns with the sequences: n micro-batches of one process are one of each of n.
        """
        rows: list[list[list[int]]] = [[] for _ in range(count)]
        documents: list[list[tuple[str, int]]] = [[] for _ in range(count)]
        for _ in range(num_sequences):
            for number in range(count):
                for process in range(self.num_processes):
                    tokens, taken = self._take(sequence_tokens)
                    if process == self.rank:
                        rows[number].append(tokens)
                        documents[number] += taken
        return tuple(map(self._batch, rows, documents))

    def next_batch(self, num_sequences: int, sequence_tokens: int) -> Batch:
        """The next micro-batch [num_sequences, sequence_tokens] of this process, one that is a whole step."""
        return self.next_batches(1, num_sequences, sequence_tokens)[0]

    def _batch(self, rows: list[list[int]], documents: list[tuple[str, int]]) -> Batch:
        ids = tuple(dict.fromkeys(identity for identity, _ in documents))
        return Batch(torch.tensor(rows, dtype=torch.int64), ids, self._bounds(documents, len(rows)))

    def _bounds(self, documents: list[tuple[str, int]], num_sequences: int) -> Tensor | None:
        # A document that goes on in the next row is listed once a row.
        if not self.document_boundaries or len(documents) == num_sequences:
            return None
        return torch.tensor([0, *accumulate(count for _, count in documents)], dtype=torch.int32)

    def _take(self, count: int) -> tuple[list[int], list[tuple[str, int]]]:
        lane = self._lanes[self._turn]
        self._turn = (self._turn + 1) % len(self._lanes)
        while len(lane.tokens) < count:
            self._append_document(lane)
        return lane.take(count)

    def _append_document(self, lane: Lane) -> None:
        behind = [tokens / weight for tokens, weight in zip(self.tokens_of_source, self.weights, strict=True)]
        source = behind.index(min(behind))
        identity, tokens = self.streams[source].next()
        self.tokens_of_source[source] += len(tokens)
        lane.append(identity, tokens)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, as JSON values."""
        return {
            "streams": [stream.state_dict() for stream in self.streams],
            "tokens_of_source": list(self.tokens_of_source),
            "turn": self._turn,
            "lanes": [
                {"tokens": list(lane.tokens), "documents": [list(entry) for entry in lane.documents]}
                for lane in self._lanes
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place that `state_dict` gave."""
        for stream, place in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(place)
        self.tokens_of_source = list(state["tokens_of_source"])
        self._turn = state["turn"]
        self._lanes = [
            Lane(list(lane["tokens"]), [(str(identity), int(count)) for identity, count in lane["documents"]])
            for lane in state["lanes"]
        ]
