"""What the teacher said, stored: its most probable next tokens, and the inputs of its attention layers.

A row of a batch is found again by all that the teacher's answer depends on, its tokens and where documents begin in it.
So stages, plans and runs with the same teacher share the answers, whatever their batches are. Training always takes the
stored values, also those of a row that was computed a moment ago: a run does not depend on what was there before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridize.distillation.attention_from_inputs import attention_from_inputs
from hybridize.distillation.cache_store import CacheStore
from hybridize.distillation.data import Batch
from hybridize.distillation.teacher import AttentionTrace, Teacher
from hybridize.distillation.top_k import TOP_K_NAMES, Rows, TopK, decode_top_k, encode_top_k
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.schema import TeacherCache
from hybridize_kernels.distillation_loss import top_k_targets

TOP_K = "top-k"
LAYER_INPUTS = "layer-inputs"
DEFAULT_FOLDER = "teacher-cache"


def row_keys(batch: Batch) -> list[str]:
    """SHA-256 of each row's length, tokens and document bounds, all int32 little-endian, in hexadecimal.

    Args:
        batch: tokens [B, T]; bounds of documents in the flattened rows, every row edge among them, or None where each
            row is one text. Tokens on a GPU, of which the batch has no copy on the host, make that wait.

    Raises:
        ValueError: a document goes from one row into the next.
    """
    batch = batch.on_host or batch
    tokens = batch.tokens.to(device="cpu", dtype=torch.int32).numpy().astype("<i4", order="C", copy=False)
    num_rows, length = tokens.shape
    edges = np.arange(num_rows + 1) * length
    bounds = edges if batch.bounds is None else batch.bounds.cpu().numpy()
    first = np.searchsorted(bounds, edges)
    if first[-1] == len(bounds) or (bounds[first] != edges).any():
        raise ValueError(f"bounds {bounds.tolist()[:20]} do not hold every edge of {num_rows} rows of {length} tokens")
    keys = []
    for row in range(num_rows):
        digest = hashlib.sha256(np.array([length], "<i4").tobytes())
        digest.update(tokens[row].tobytes())
        digest.update((bounds[first[row] : first[row + 1] + 1] - edges[row]).astype("<i4").tobytes())
        keys.append(digest.hexdigest())
    return keys


class CachedTeacher:
    """A teacher that computes only what was not stored.

    Args:
        teacher: answers for rows that are missing.
        store: of this teacher and this `top_k`.
        top_k: next tokens a position; the whole vocabulary if that is smaller.
        layer_inputs: also store what goes into the attention of the layers that `trace` is asked for.
    """

    def __init__(self, teacher: Teacher, store: CacheStore, *, top_k: int, layer_inputs: bool = False) -> None:
        self.teacher, self.store = teacher, store
        self.head: Any = teacher.model.lm_head
        self.vocabulary = len(self.head.weight)
        self.top_k = min(top_k, self.vocabulary)
        self.layer_inputs = layer_inputs
        self.device = self.head.weight.device
        self._pins = self.device.type == "cuda"
        self._on_their_way: list[tuple[torch.cuda.Event, str, list[str], Rows]] = []

    @torch.no_grad()
    def targets(self, batch: Batch, keys: Sequence[str] | None = None) -> TopK:
        """The teacher's k most probable next tokens at every position, in the shape of its hidden states.

        Args:
            keys: `row_keys(batch)`, for whom has them since before the tokens went to the GPU.

        Returns:
            [B, T, k]; [1, B·T, k] of packed documents.
        """
        keys = row_keys(batch) if keys is None else keys
        stored, missing = self._look_up(TOP_K, keys, TOP_K_NAMES)
        fresh: Rows = {}
        if missing:
            part, rows = self._part(batch, [keys.index(key) for key in missing])
            hidden = self.teacher.last_hidden(part).reshape(*part.tokens.shape, -1)[rows]
            ids, log_probs = top_k_targets(hidden, self.head.weight, self.top_k, bias=self.head.bias)
            fresh = encode_top_k(ids, log_probs, self.vocabulary)
            self._keep(TOP_K, missing, fresh)
        found = decode_top_k({name: self._assemble(stored[name], keys, missing, fresh.get(name)) for name in stored})
        if batch.bounds is None:
            return found
        return TopK(found.ids.flatten(0, 1)[None], found.log_probs.flatten(0, 1)[None])

    @torch.no_grad()
    def trace(self, batch: Batch, layers: Iterable[int]) -> dict[int, AttentionTrace]:
        """Input and output of the attention of these layers; the output is computed from the stored input."""
        wanted = sorted(set(layers))
        if not self.layer_inputs:
            return self.teacher.trace(batch, wanted)
        keys = row_keys(batch)
        stored, missing = self._look_up(LAYER_INPUTS, keys, [str(index) for index in wanted])
        fresh: Rows = {}
        if missing:
            part, rows = self._part(batch, [keys.index(key) for key in missing])
            for index, trace in self.teacher.trace(part, wanted).items():
                fresh[str(index)] = trace.hidden_states.reshape(*part.tokens.shape, -1)[rows]
            self._keep(LAYER_INPUTS, missing, fresh)
        inputs = {int(name): self._assemble(rows, keys, missing, fresh.get(name)) for name, rows in stored.items()}
        return attention_from_inputs(self.teacher.model, batch, inputs)

    def flush(self) -> None:
        """Writes all that was computed; called before a checkpoint that relies on it.

        Raises:
            ResourceError: disk full, and the like.
        """
        self._arrive()
        self.store.flush()

    def close(self) -> None:
        """`flush`, and closes the store."""
        self._arrive()
        self.store.close()

    # Rows.

    def _look_up(
        self, kind: str, keys: Sequence[str], names: Sequence[str]
    ) -> tuple[dict[str, list[Tensor | None]], list[str]]:
        """The stored rows, and the keys of those that lack something, each once."""
        self._arrive()
        stored = self.store.get(kind, keys, names)
        lacking = (key for key, *row in zip(keys, *stored.values(), strict=True) if any(t is None for t in row))
        return stored, list(dict.fromkeys(lacking))

    def _part(self, batch: Batch, rows: list[int]) -> tuple[Batch, slice | list[int]]:
        """What the teacher has to read for these rows of a batch, and which rows of that they are."""
        if len(rows) == len(batch.tokens):
            return batch, slice(None)
        if batch.bounds is not None:  # one packed text, whose documents are laid end to end
            return batch, rows
        return replace(batch, tokens=batch.tokens[rows], on_host=None), slice(None)

    def _assemble(
        self, stored: Sequence[Tensor | None], keys: Sequence[str], missing: Sequence[str], fresh: Tensor | None
    ) -> Tensor:
        """[B, ...] on the teacher's device: the stored rows, and the fresh ones where there are none."""
        there = [row for row in stored if row is not None]
        if fresh is not None and not there and list(keys) == list(missing):
            return fresh
        gaps = [number for number, row in enumerate(stored) if row is None]
        if not gaps:
            return self._to_device(there)
        assert fresh is not None
        place = {key: number for number, key in enumerate(missing)}
        whole = fresh.new_empty(len(keys), *fresh.shape[1:])
        whole[gaps] = fresh[[place[keys[number]] for number in gaps]]
        if there:
            whole[[number for number, row in enumerate(stored) if row is not None]] = self._to_device(there)
        return whole

    def _to_device(self, rows: Sequence[Tensor]) -> Tensor:
        whole = torch.empty(len(rows), *rows[0].shape, dtype=rows[0].dtype, pin_memory=self._pins)
        return torch.stack(list(rows), out=whole).to(self.device, non_blocking=True)

    def _keep(self, kind: str, keys: list[str], fresh: Rows) -> None:
        """Hands rows to the store; from a GPU they are on their way until the next call, so that nobody waits."""
        if not self._pins:
            self.store.put(kind, keys, {name: tensor.detach().cpu().clone() for name, tensor in fresh.items()})
            return
        copies = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in fresh.items()}
        for name, tensor in fresh.items():
            copies[name].copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self.device))
        self._on_their_way.append((arrived, kind, keys, copies))

    def _arrive(self) -> None:
        while self._on_their_way:
            arrived, kind, keys, copies = self._on_their_way.pop(0)
            arrived.synchronize()
            self.store.put(kind, keys, copies)


def open_teacher_cache(
    settings: TeacherCache,
    teacher: Teacher,
    *,
    fingerprint: str,
    run: Path,
    base: Path,
    reporter: Reporter = SILENT,
) -> CachedTeacher:
    """The teacher with the cache that a recipe asks for.

    Args:
        settings: `distill.teacher_cache`.
        fingerprint: of the teacher's files.
        run: the run folder. base: the folder that the recipe's paths start from.

    Raises:
        RecipeError: the folder belongs to another teacher, dtype or k.
        ResourceError: the folder cannot be written.
    """
    folder = run / DEFAULT_FOLDER if settings.folder is None else base / Path(settings.folder).expanduser()
    dtype = str(teacher.model.lm_head.weight.dtype).removeprefix("torch.")
    identity = {"fingerprint": fingerprint, "dtype": dtype, "top_k": settings.top_k}
    store = CacheStore(folder, identity=identity, reporter=reporter)
    return CachedTeacher(teacher, store, top_k=settings.top_k, layer_inputs=settings.layer_inputs)
