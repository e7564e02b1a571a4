"""Tiny checkpoints and broken ones, written byte by byte; and the one way in which all of them must be refused."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hybridize.errors import CheckpointError, HybridizeError

CONFIG = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 2, "dtype": "float32"}
NAMES = ("model.embed_tokens.weight", "model.layers.0.a.weight", "model.layers.1.a.weight", "model.norm.weight")


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: Mapping[str, Any] | bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file; `length` replaces the true length of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def matrices(names: tuple[str, ...] = NAMES, dtype: str = "F32") -> bytes:
    """A whole file of [2, 2] fp32 matrices that are neither zero nor alike."""
    import struct

    header = {name: entry(16 * index, 16 * index + 16, [2, 2], dtype) for index, name in enumerate(names)}
    body = b"".join(struct.pack("<4f", *(index + 1 + column / 4 for column in range(4))) for index in range(len(names)))
    return pack(header, body)


def single(folder: Path, content: bytes | None = None, config: Mapping[str, Any] = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(matrices() if content is None else content)
    return folder


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(folder: Path, weight_map: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / SHARDS[0]).write_bytes(matrices(NAMES[:2]))
    (folder / SHARDS[1]).write_bytes(matrices(NAMES[2:]))
    write_index(folder, true_map() if weight_map is None else weight_map)
    return folder


def true_map() -> dict[str, Any]:
    return {name: SHARDS[index // 2] for index, name in enumerate(NAMES)}


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    document = {"metadata": {"total_size": 64}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything about a folder's entries that a reader must leave alone; pipes are not opened."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def assert_refused(
    folder: Path, action: Callable[[], Any], *mentions: str, kind: type[HybridizeError] = CheckpointError
) -> None:
    """`action` raises exactly `kind`, says each of `mentions`, gives advice, and leaves the folder as it was."""
    before = snapshot(folder)
    names = sorted(os.listdir(folder.parent))
    with pytest.raises(HybridizeError) as caught:
        action()
    assert type(caught.value) is kind, caught.value
    for mention in mentions:
        assert mention in str(caught.value)
    assert caught.value.where
    assert caught.value.hint
    assert snapshot(folder) == before
    assert sorted(os.listdir(folder.parent)) == names
