"""Prefill: texts go through the layers piece by piece, each into the states of its rows.

Where no state grows with the text, one piece after another is the same work on the same memory. On a GPU it can then be
recorded as a CUDA graph: a small model's pieces take the host longer to queue than the device to compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridize.inference.decoder import Decoder
from hybridize.inference.pieces import Piece, pieces
from hybridize.inference.recorded import Recorded
from hybridize.inference.states import States

Texts = Sequence[Sequence[int]]
WORTH_RECORDING = 6
"""Equal pieces of one text; before one is recorded it is run twice, for nothing."""


class Reader:
    """Reads texts into states.

    Args:
        decoder: the layers. states: what they hold. logits: [B, vocabulary], written after the last token of a row.
        records: equal pieces of a long text are recorded.
    """

    def __init__(self, decoder: Decoder, states: States, logits: Tensor, *, records: bool) -> None:
        self._decoder, self._states, self._logits = decoder, states, logits
        self._records = records and not states.grows
        self._recorded: tuple[tuple[int, int, int], RecordedPiece] | None = None

    def read(
        self, texts: Texts, positions: Sequence[int], chunk_tokens: int, on_tokens: Callable[[int], None] | None
    ) -> None:
        """Appends texts[i] to row i, which stands at positions[i]."""
        found = pieces([len(text) for text in texts], positions, chunk_tokens)
        alike = Counter((piece.first, piece.end, piece.length) for piece in found)
        for piece in found:
            parts = [texts[row][piece.start : piece.start + piece.length] for row in range(piece.first, piece.end)]
            before = [position + piece.start for position in positions[piece.first : piece.end]]
            rows = slice(piece.first, piece.end)
            worth = alike[piece.first, piece.end, piece.length] >= WORTH_RECORDING
            if piece.padded:
                self._logits[rows] = self._read_padded(parts, before, piece)
            else:
                last = self._read_alike(parts, before[0], piece, recorded=worth and self._records and before[0] > 0)
                if piece.start + piece.length == len(texts[piece.first]):
                    self._logits[rows] = self._decoder.logits(last)
            if on_tokens is not None:
                on_tokens(sum(len(part) for part in parts))

    def _read_alike(self, parts: Texts, before: int, piece: Piece, *, recorded: bool) -> Tensor:
        """Rows that go on alike; returns [rows, width] of the last token, before the last norm."""
        tokens = torch.tensor([list(part) for part in parts])
        if not recorded:
            cache = self._states.rows(piece.first, piece.end, before)
            return self._decoder.read(tokens.to(self._logits.device, non_blocking=True), None, cache)[:, -1]
        key = piece.first, piece.end, piece.length
        if self._recorded is None or self._recorded[0] != key:
            self._recorded = None  # its memory goes before the next one's comes
            self._recorded = key, RecordedPiece(self._decoder, self._states, piece)
        return self._recorded[1](tokens, before)

    def _read_padded(self, parts: Texts, before: Sequence[int], piece: Piece) -> Tensor:
        """Rows of different lengths or positions, padded on the right; returns [rows, vocabulary]."""
        device = self._logits.device
        tokens = torch.tensor([[*part, *[0] * (piece.length - len(part))] for part in parts]).to(device)
        counts = torch.tensor([len(part) for part in parts], device=device)[:, None]
        first = torch.tensor(before, device=device)
        columns = torch.arange(piece.length, device=device)
        positions = torch.where(columns < counts, columns + first[:, None], -1)
        cache = self._states.rows(piece.first, piece.end, max(before), before=first - 1)
        x = self._decoder.read(tokens, positions, cache)
        last = x.take_along_dim((counts - 1).clamp(min=0)[..., None], dim=1)[:, 0]
        return torch.where(counts > 0, self._decoder.logits(last), self._logits[piece.first : piece.end])


class RecordedPiece:
    """A piece of rows that have a past, at any position, recorded where there is a GPU."""

    def __init__(self, decoder: Decoder, states: States, piece: Piece) -> None:
        device = decoder.model.device
        self._tokens = torch.zeros(piece.end - piece.first, piece.length, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._columns = torch.arange(piece.length, device=device)
        cache = states.rows(piece.first, piece.end, 1)
        held = [tensor for state in cache.layers for tensor in state.tensors.values()]
        self._before = [tensor.clone() for tensor in held]
        self._last: Tensor | None = None

        def run() -> None:
            last = decoder.read(self._tokens, self._positions, cache)[:, -1]
            self._last = last.clone() if self._last is None else self._last.copy_(last)

        def restore() -> None:
            for tensor, value in zip(held, self._before, strict=True):
                tensor.copy_(value)

        self._run = Recorded(run, device, restore)

    def __call__(self, tokens: Tensor, before: int) -> Tensor:
        """tokens [rows, T] follow `before` others; returns [rows, width] of the last, before the last norm."""
        self._tokens.copy_(tokens, non_blocking=True)
        self._positions.copy_(self._columns + before)
        self._run.prepare()
        self._before.clear()
        self._run()
        assert self._last is not None
        return self._last
