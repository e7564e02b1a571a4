"""Texts that were read, as a file: what the states hold of each row, so that nobody reads them twice.

The file is a safetensors file. It belongs to one model: its states mean nothing to another, not even to the same one
in another dtype.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridize.checkpoint import load_file, load_one, save_file
from hybridize.errors import CheckpointError, UsageError
from hybridize.inference.full_attention import FullAttentionState
from hybridize.mixers.parts.position_slots import PositionState

if TYPE_CHECKING:
    from hybridize.inference.engine import Engine

VERSION = "1"
_NOTE = "note."
"""Before the keys of a note, so that none is one of ours."""
_SAMPLED = 256
"""Numbers of each tensor that a model is known by."""
_NOT_OF_THE_MODEL = {"transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype"}


def fingerprint(model: Any) -> str:
    """One SHA-256 for a loaded model: its configuration, dtypes, and some numbers of every parameter and buffer."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            some = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLED)]
            digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
            digest.update(memoryview(some.contiguous().cpu().view(torch.uint8).numpy()))
    return digest.hexdigest()


def save(engine: Engine, path: str | Path, rows: Sequence[int], note: Mapping[str, str]) -> None:
    """Writes the states of these rows, their texts and their last logits.

    Raises:
        UsageError: the texts are not known, or no row is named.
        ResourceError: no room on the disk.
    """
    if engine.texts is None:
        raise UsageError("the texts of these states are not known.", hint="They were pretended, or run for a time.")
    if not rows:
        raise UsageError("there is no row to save.", where="rows")
    index = torch.tensor(list(rows), device=engine.device)
    longest = max(engine.lengths[row] for row in rows)
    tensors = {name: tensor[index] for name, tensor in _filled(engine, longest).items()}
    tensors["logits"] = engine.logits[index]
    tensors["lengths"] = torch.tensor([engine.lengths[row] for row in rows])
    tensors["texts"] = torch.tensor([token for row in rows for token in engine.texts[row]], dtype=torch.int32)
    noted = {f"{_NOTE}{key}": value for key, value in note.items()}
    save_file(path, tensors, {**noted, "hybridize_state": VERSION, "model": fingerprint(engine.model)})


def load(engine: Engine, path: str | Path) -> dict[str, str]:
    """Puts the rows of a file into the engine's first rows; the others become empty.

    Returns:
        The note that was saved with it.

    Raises:
        CheckpointError: the file is damaged, of another kind or of another model.
        UsageError: it has more rows or longer texts than there is room for.
    """
    tensors, metadata = load_file(path)
    where = str(path)
    if metadata.get("hybridize_state") != VERSION:
        hint = "Give a file that `hybridize generate --save-state` or Engine.save wrote."
        raise CheckpointError("This is no saved state that this release reads.", where=where, hint=hint)
    if metadata.get("model") != fingerprint(engine.model):
        hint = "Use the model and the dtype that the state was saved with, or read the text again."
        raise CheckpointError("The state was saved with another model.", where=where, hint=hint)
    lengths: list[int] = tensors["lengths"].tolist()
    if len(lengths) > engine.batch:
        raise UsageError(f"{len(lengths)} rows, and room for {engine.batch}.", where=where, hint="Give a larger batch.")
    engine.require_room(lengths, of_empty_rows=True)
    engine.reset()
    for name, tensor in engine.states.named():
        saved = tensors[name]
        target = tensor[: len(lengths)]
        for dimension, size in enumerate(saved.shape):
            target = target.narrow(dimension, 0, size)
        target.copy_(saved)
    engine.logits[: len(lengths)] = tensors["logits"].to(engine.device)
    texts = tensors["texts"].tolist()
    ends = tensors["lengths"].cumsum(0).tolist()
    engine.begin_from([texts[end - length : end] for end, length in zip(ends, lengths, strict=True)])
    return note_of(metadata)


def note_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `save` was given as a note, from a file's metadata."""
    return {key.removeprefix(_NOTE): value for key, value in metadata.items() if key.startswith(_NOTE)}


def look_into(path: str | Path) -> tuple[int, dict[str, str]]:
    """Tokens of the longest text in a saved state, and the note; the states themselves are not read.

    Raises:
        CheckpointError: there is no such file, or it is of another kind.
    """
    lengths, metadata = load_one(path, "lengths")
    return int(lengths.max()), note_of(metadata)


def _filled(engine: Engine, tokens: int) -> dict[str, Tensor]:
    """Every tensor of the states, as far as `tokens` tokens fill it."""
    found = dict(engine.states.named())
    for index, state in enumerate(engine.states.layers):
        for name in state.tensors:
            key = f"layers.{index}.{name}"
            if isinstance(state, FullAttentionState):
                found[key] = found[key][:, :, :tokens]
            elif isinstance(state, PositionState) and name != "lengths":
                filled = tokens // state.block_tokens if name.startswith("compressed") else tokens
                found[key] = found[key][:, :filled]
    return found
