"""A model set up to decode: states of fixed place, prefill in chunks, a step of all layers in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.errors import UsageError
from hybridize.families import family
from hybridize.inference import saved
from hybridize.inference.decoder import Decoder
from hybridize.inference.pretend import pretend_read
from hybridize.inference.reader import Reader
from hybridize.inference.recorded import Recorded
from hybridize.inference.sampling import Sampling, choose
from hybridize.inference.states import States
from hybridize.model.training_form import enter
from hybridize_kernels import early_launches

LOOK_STEPS = 16
"""Decoding steps between two looks at what was written: a look waits for the GPU."""
_CHANGES_WITH_LENGTH = {"dynamic", "longrope"}
"""Rotary positions that look at the longest text of every step: no graph can hold that."""


@dataclass(frozen=True)
class EngineSnapshot:
    """All that an engine's rows hold, copied."""

    tensors: dict[str, Tensor]
    logits: Tensor
    lengths: list[int]
    texts: list[list[int]] | None


class Engine:
    """Reads and writes `batch` rows of text, each at a position of its own.

    All memory of the rows is allocated here, once. On a GPU a step of all layers, with the choice of the next token, is
    recorded as a CUDA graph at the first call and replayed; on a CPU the same things are done one by one.

    Args:
        model: a causal language model of a supported family, hybrid or not, in eval mode, adapters merged. Its
            projections are joined and its layers fused in place; its parameters keep their names and values, and must
            not change while the engine is there.
        batch: rows, B.
        context_tokens: room a row in layers whose state grows with the text (full attention, native sparse attention);
            a hybrid of constant memory goes on past it.
        chunk_tokens: most tokens that go through the layers at once in prefill, over all rows of a pass; None: 8192 on
            a GPU, 1024 on a CPU, where masks take the square of it.
        record: False: no CUDA graph.
        record_reading: long texts are read by CUDA graphs, too, where no state grows with the text. It pays for small
            models, whose pieces take the host longer to queue than the device to compute.
    """

    @torch.inference_mode(False)  # what is made in that mode may not be written outside of it
    def __init__(
        self,
        model: Any,
        *,
        batch: int,
        context_tokens: int,
        chunk_tokens: int | None = None,
        record: bool = True,
        record_reading: bool = False,
    ) -> None:
        if chunk_tokens is None:
            chunk_tokens = 8192 if model.device.type == "cuda" else 1024
        for name, count in (("batch", batch), ("context_tokens", context_tokens), ("chunk_tokens", chunk_tokens)):
            if count < 1:
                raise UsageError(f"must be at least 1, is {count}.", where=name)
        self.model, self.batch, self.context_tokens, self.chunk_tokens = model, batch, context_tokens, chunk_tokens
        adapter = family(model.config.model_type)
        self.geometry = adapter.geometry(model.config.to_dict())
        device = self.device = model.device
        enter(model)
        with torch.no_grad():
            self.states = States(model, adapter, self.geometry, batch=batch, context_tokens=context_tokens)
            self._decoder = Decoder(model, adapter, self.states)
        self._turn = 0
        """Counts what changed rows, so that a writer that was left aside notices."""
        self.lengths = [0] * batch
        """Tokens that each row has read, those that it wrote included."""
        self.texts: list[list[int]] | None = [[] for _ in range(batch)]
        """These tokens; None where rows went on without anyone looking."""
        integers = {"dtype": torch.int64, "device": device}
        self.logits = torch.zeros(batch, self.geometry.vocab_size, device=device, dtype=model.dtype)
        """[B, vocabulary], after the last token of each row."""
        self._positions, self._tokens = torch.zeros(batch, **integers), torch.zeros(batch, **integers)
        self._active = torch.zeros(batch, dtype=torch.bool, device=device)
        self._uniform = torch.zeros(LOOK_STEPS, batch, device=device)
        self._written = torch.zeros(LOOK_STEPS, batch, **integers)
        self._number = torch.zeros(1, **integers)
        self._ends = torch.zeros(0, **integers)
        self._generator = torch.Generator().manual_seed(0)
        rope_type = getattr(model.model.rotary_emb, "rope_type", "default")
        self._records = record and rope_type not in _CHANGES_WITH_LENGTH
        self._reader = Reader(self._decoder, self.states, self.logits, records=self._records and record_reading)
        self._forward = Recorded(self._step, device, self._rest, enabled=self._records)
        self._writing: dict[tuple[Sampling, int], Recorded] = {}

    def state_bytes(self) -> int:
        """Bytes of decoding state of one sequence, as they are allocated."""
        return self.states.bytes_per_sequence()

    def seed(self, seed: int) -> None:
        """Of all that is drawn from now on; the same on every device."""
        self._generator.manual_seed(seed)

    # Reading.

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]], *, on_tokens: Callable[[int], None] | None = None) -> Tensor:
        """Appends a text to each row, chunk by chunk; an empty one leaves its row as it is.

        Args:
            texts: B lists of tokens.
            on_tokens: told after every piece how many tokens it had.

        Returns:
            `logits`.

        Raises:
            UsageError: not a text for each row, a token outside the vocabulary, or more than there is room for. After
                any other error, a full memory or an interrupt say, every row is empty.
        """
        if len(texts) != self.batch:
            raise UsageError(f"{len(texts)} texts for {self.batch} rows.", hint="Give one a row; it may be empty.")
        lengths = [len(text) for text in texts]
        self._require_known(texts)
        self.require_room(lengths)
        try:
            self._reader.read(texts, self.lengths, self.chunk_tokens, on_tokens)
        except BaseException:
            self.reset()  # some layers have read what others have not
            raise
        self._went_on(texts)
        self._positions.copy_(torch.tensor(self.lengths))
        return self.logits

    # Writing.

    @torch.no_grad()
    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Appends one token to each row, [B]; −1 leaves a row as it is.

        Returns:
            `logits`.
        """
        given = torch.as_tensor(tokens, dtype=torch.int64)
        if tuple(given.shape) != (self.batch,):
            raise UsageError(f"tokens of shape {list(given.shape)} for {self.batch} rows.", hint="Give one a row.")
        new = [[token] if token >= 0 else [] for token in given.tolist()]
        self._require_known(new)
        self.require_room([len(text) for text in new])
        self._forward.prepare()
        self._active.copy_(given >= 0)
        self._tokens.copy_(given.clamp(min=0))
        self._forward()
        self._went_on(new)
        return self.logits

    @torch.no_grad()
    def write(
        self,
        new_tokens: int,
        sampling: Sampling | None = None,
        *,
        ends: Sequence[int] = (),
        rows: Sequence[int] | None = None,
    ) -> Iterator[list[list[int]]]:
        """Goes on with each row by at most `new_tokens` tokens, which are part of its text from then on.

        Args:
            sampling: how tokens are chosen; the likeliest unless given.
            ends: tokens after which a row stops; they are written, too.
            rows: which rows write; all unless given.

        Yields:
            After every few steps, the new tokens of each row, which are part of `texts` by then.

        Raises:
            UsageError: a row has read nothing, or there is no room; or rows were changed otherwise between two looks.
        """
        sampling = sampling or Sampling()
        writing = list(range(self.batch)) if rows is None else list(rows)
        for row in writing:
            if not 0 <= row < self.batch:
                raise UsageError(f"there is no row {row} among {self.batch}.", where="rows")
            if self.lengths[row] == 0:
                raise UsageError("there is nothing to go on from.", where=f"row {row}", hint="Read a text first.")
        self.require_room([new_tokens * (row in writing) for row in range(self.batch)])
        step = self._writing_step(sampling, ends)
        self._active.zero_()
        self._active[writing] = True
        turn = self._turn = self._turn + 1
        done = 0
        while done < new_tokens and writing:
            count = min(LOOK_STEPS, new_tokens - done)
            self._uniform.copy_(torch.rand(self._uniform.shape, generator=self._generator))
            self._number.zero_()
            for _ in range(count):
                step()
            written = self._written[:count].T.tolist()
            new = [[token for token in row if token >= 0] for row in written]
            self._went_on(new)
            turn, done = self._turn, done + count
            yield new
            if self._turn != turn:
                raise UsageError(
                    "rows were changed while one was writing.", hint="Let a writer end, or leave it, before you go on."
                )
            writing = [row for row in writing if len(new[row]) == count and new[row][-1] not in ends]

    @torch.no_grad()
    def run(self, steps: int) -> None:
        """So many greedy steps of all rows, without a look at what they write: what decoding costs by itself."""
        self.require_room([steps] * self.batch)
        step = self._writing_step(Sampling(), ())
        self._active.fill_(True)
        for _ in range(steps):
            step()
        self.lengths = [length + steps for length in self.lengths]
        self.texts = None
        self._turn += 1

    def _writing_step(self, sampling: Sampling, ends: Sequence[int]) -> Recorded:
        """The recorded step of a sampling; what ends a row is data, as far as there is as much of it."""
        key = sampling, len(ends)
        if key not in self._writing:
            self._writing.clear()
            self._ends = torch.tensor(list(ends), dtype=torch.int64, device=self.device)
            self._writing[key] = Recorded(
                lambda: self._choose_and_step(sampling), self.device, self._rest, enabled=self._records
            )
        self._writing[key].prepare()
        self._ends.copy_(torch.tensor(list(ends), dtype=torch.int64))
        return self._writing[key]

    def _choose_and_step(self, sampling: Sampling) -> None:
        number = self._number
        chosen = choose(self.logits, self._uniform.index_select(0, number)[0], sampling)
        self._written.index_copy_(0, number, torch.where(self._active, chosen, -1)[None])
        self._tokens.copy_(chosen)
        self._step()
        if len(self._ends):
            self._active.logical_and_((chosen[:, None] != self._ends).all(-1))
        number.add_(1).remainder_(LOOK_STEPS)

    def _step(self) -> None:
        active = self._active
        with early_launches():
            logits = self._decoder.step(self._tokens, torch.where(active, self._positions, -1))
        torch.where(active[:, None], logits, self.logits, out=self.logits)
        self._positions.add_(active)

    def _rest(self) -> None:
        """All rows stay as they are in the steps to come."""
        self._active.zero_()

    # Rows.

    @torch.no_grad()
    def reset(self) -> None:
        """Every row is empty again."""
        self.states.reset()
        self.begin_from([])

    @torch.no_grad()
    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was, in place: beams change places, one row becomes several.

        Raises:
            UsageError: not one a row, or a row that is not there.
        """
        if len(rows) != self.batch or not all(0 <= row < self.batch for row in rows):
            raise UsageError(f"rows {list(rows)} for {self.batch} rows.", hint="Give one of them for each row.")
        index = torch.tensor(list(rows), device=self.device)
        self.states.take(index)
        for tensor in (self.logits, self._positions):
            tensor.copy_(tensor.index_select(0, index))
        self._turn += 1
        self.lengths = [self.lengths[row] for row in rows]
        if self.texts is not None:
            self.texts = [list(self.texts[row]) for row in rows]

    @torch.no_grad()
    def snapshot(self) -> EngineSnapshot:
        """A copy of all rows, to come back to."""
        tensors = {name: tensor.clone() for name, tensor in self.states.named()}
        texts = None if self.texts is None else [list(text) for text in self.texts]
        return EngineSnapshot(tensors, self.logits.clone(), list(self.lengths), texts)

    @torch.no_grad()
    def restore(self, snapshot: EngineSnapshot) -> None:
        """Every row is again as it was, bit for bit; nothing changes its place."""
        for name, tensor in self.states.named():
            tensor.copy_(snapshot.tensors[name])
        self.logits.copy_(snapshot.logits)
        self._turn += 1
        self.lengths = list(snapshot.lengths)
        self.texts = None if snapshot.texts is None else [list(text) for text in snapshot.texts]
        self._positions.copy_(torch.tensor(self.lengths))

    @torch.no_grad()
    def save(
        self, path: str | Path, *, rows: Sequence[int] | None = None, note: Mapping[str, str] | None = None
    ) -> None:
        """Writes the states of rows, all unless given, to a safetensors file, with texts of your own as a note."""
        saved.save(self, path, range(self.batch) if rows is None else rows, note or {})

    @torch.no_grad()
    def load(self, path: str | Path) -> dict[str, str]:
        """Puts the rows of such a file into the first rows, bit for bit; the others become empty. Returns the note.

        Raises:
            CheckpointError: the file is damaged, or of another model.
            UsageError: there is no room.
        """
        return saved.load(self, path)

    def begin_from(self, texts: Sequence[Sequence[int]]) -> None:
        """The states have read these texts; rows without one are empty."""
        self._turn += 1
        known = [*texts, *[[] for _ in range(self.batch - len(texts))]]
        self.texts = [list(text) for text in known]
        self.lengths = [len(text) for text in known]
        self._positions.copy_(torch.tensor(self.lengths))

    @torch.no_grad()
    def pretend(self, tokens: int) -> None:
        """States as after `tokens` random tokens a row, without reading them; for measuring what a step costs."""
        self.reset()
        self.require_room([tokens] * self.batch)
        pretend_read(self.states, tokens)
        self.lengths = [tokens] * self.batch
        self.texts = None
        self._positions.fill_(tokens)

    def require_room(self, new_tokens: Sequence[int], *, of_empty_rows: bool = False) -> None:
        """Raises UsageError unless the first rows have room for so many tokens more, or would have, were they empty."""
        for row, new in enumerate(new_tokens):
            length = 0 if of_empty_rows else self.lengths[row]
            if self.states.grows and new and length + new > self.context_tokens:
                raise UsageError(
                    f"{length + new} tokens, and room for {self.context_tokens}.",
                    where=f"row {row}",
                    hint="Give more (context_tokens, --context-tokens): the state of some layers grows with the text.",
                )

    def _require_known(self, texts: Sequence[Sequence[int]]) -> None:
        """Raises UsageError where a token is outside the vocabulary: a GPU would not survive it."""
        for row, text in enumerate(texts):
            if len(text) and not 0 <= min(text) <= max(text) < self.geometry.vocab_size:
                raise UsageError(f"a token is outside 0..{self.geometry.vocab_size - 1}.", where=f"row {row}")

    def _went_on(self, new: Sequence[Sequence[int]]) -> None:
        self._turn += 1
        self.lengths = [length + len(text) for length, text in zip(self.lengths, new, strict=True)]
        if self.texts is not None:
            for text, more in zip(self.texts, new, strict=True):
                text.extend(more)
