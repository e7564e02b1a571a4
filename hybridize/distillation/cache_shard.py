"""The files of the teacher cache: rows of tensors, in safetensors files that are named by the SHA-256 of their bytes.

A shard gets its name when it is whole and durable, so that a process may be killed at any time and what stands under
such a name either has these bytes or was damaged since. There is nothing beside it that it could disagree with.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hybridize.checkpoint import fault_point, resource_errors, save_tensors, sha256_file
from hybridize.checkpoint.files import list_names, open_regular
from hybridize.checkpoint.lock import process_is_alive
from hybridize.checkpoint.safetensors_header import read_safetensors_header
from hybridize.errors import CheckpointError
from hybridize.files import sync_file

KEYS = "keys"
"""Name of the tensor [rows, 32] uint8 that holds the rows' keys."""
KEY_BYTES = 32
_SHARD = re.compile(r"(?P<kind>[a-z][a-z-]*)\.(?P<sha256>[0-9a-f]{64})\.safetensors")
_PARTIAL = re.compile(r"\.(?P<host>.+)-(?P<process>\d+)-[0-9a-f]{8}\.partial\.safetensors")
_ABANDONED_S = 24 * 3600
"""A partial file of another machine, whose processes cannot be asked for, is left over after this time."""
_DTYPES = {
    "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class DamagedShardError(CheckpointError):
    """A shard that can be read and is not what was written."""


class Block:
    """Rows that are in memory only.

    Args:
        keys: one a row.
        tensors: by name, each [rows, ...], on the CPU.
    """

    def __init__(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        self.keys = tuple(keys)
        self.tensors = dict(tensors)
        self.names = frozenset(tensors)

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def signature(self) -> tuple[tuple[str, torch.dtype, torch.Size], ...]:
        """Blocks that agree in it fit into one shard."""
        return tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(self.tensors.items()))

    def row(self, name: str, index: int) -> Tensor:
        return self.tensors[name][index]


class Shard:
    """A file of the cache; its header is read and checked, its rows are mapped when they are asked for.

    Args:
        folder, name: of the file.

    Attributes:
        kind: what its rows are. names: of the tensors that it has for each row.
        size_bytes: of the file.

    Raises:
        CheckpointError: it is gone, or may not be read. DamagedShardError: it is not laid out as a shard is.
    """

    def __init__(self, folder: Path, name: str) -> None:
        match = _SHARD.fullmatch(name)
        assert match is not None, name
        self.folder, self.name = folder, name
        self.kind, self._sha256 = match["kind"], match["sha256"]
        open_regular(folder, name)[0].close()
        try:
            self._headers = read_safetensors_header(folder, name)
        except CheckpointError as error:
            raise self._damaged(error.what) from None
        keys = self._headers.get(KEYS)
        if keys is None or keys.dtype != "U8" or keys.shape[1:] != (KEY_BYTES,):
            raise self._damaged("There are no keys of rows.")
        self.num_rows = keys.shape[0]
        self.names = frozenset(self._headers) - {KEYS}
        for header in self._headers.values():
            if header.dtype not in _DTYPES or header.shape[:1] != (self.num_rows,):
                raise self._damaged(f"Tensor {header.name!r:.80} does not have one entry a row.")
        self.size_bytes = max(header.offset_bytes + header.size_bytes for header in self._headers.values())
        self._mapped: mmap.mmap | None = None
        self._is_verified = False

    def _damaged(self, what: str) -> DamagedShardError:
        return DamagedShardError(what, where=str(self.folder / self.name), hint="Delete the file.")

    def keys(self) -> list[bytes]:
        """The rows' keys. They are read without a look at the rest: a damaged key is a row that nobody finds."""
        header = self._headers[KEYS]
        with open_regular(self.folder, self.name)[0] as file:
            file.seek(header.offset_bytes)
            data = file.read(header.size_bytes)
        return [data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]

    def open(self) -> None:
        """Maps the file; the first time its bytes are compared with its name.

        Raises:
            CheckpointError: it is gone, or may not be read. DamagedShardError: its bytes have changed.
        """
        if self._mapped is not None:
            return
        with open_regular(self.folder, self.name)[0] as file:
            # A private copy: torch wants memory that may be written, and the file must not change if someone does.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if not self._is_verified and hashlib.sha256(mapped).hexdigest() != self._sha256:
            raise self._damaged("Its bytes are not those that were written.")
        self._mapped, self._is_verified = mapped, True

    def close(self) -> None:
        """Lets the mapping go as soon as no row of it is in use."""
        self._mapped = None

    def row(self, name: str, index: int) -> Tensor:
        """One row as a view of the mapped file, which must be open."""
        header = self._headers[name]
        shape, dtype = header.shape[1:], _DTYPES[header.dtype]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        assert self._mapped is not None, "open() comes first"
        offset = header.offset_bytes + index * (header.size_bytes // self.num_rows)
        return torch.frombuffer(self._mapped, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def write_shard(folder: Path, kind: str, blocks: Sequence[Block]) -> Shard:
    """Writes blocks of one signature as a shard, in their order; equal blocks give the same file.

    Raises:
        ResourceError: disk full, and the like; nothing of it is left.
    """
    names = sorted(blocks[0].tensors)
    tensors = {name: torch.cat([block.tensors[name] for block in blocks]) for name in names}
    keys = b"".join(key for block in blocks for key in block.keys)
    tensors[KEYS] = torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, KEY_BYTES)
    stem = f".{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial"
    partial = folder / f"{stem}.safetensors"
    try:
        save_tensors(folder, tensors, stem=stem, max_shard_bytes=math.inf)
        sha256, _ = sha256_file(folder, partial.name)
        final = folder / f"{kind}.{sha256}.safetensors"
        with resource_errors(final):
            fault_point("cache-before-rename")
            os.replace(partial, final)
            fault_point("cache-after-rename")
            sync_file(folder)
    finally:
        partial.unlink(missing_ok=True)
    return Shard(folder, final.name)


def shard_names(folder: Path) -> list[str]:
    """Names of the shards in a folder, sorted."""
    return [name for name in list_names(folder) if _SHARD.fullmatch(name)]


def remove_partials(folder: Path) -> None:
    """Removes what writers that are gone have left half-written; a living writer's file stays."""
    for path in _abandoned(folder):
        with resource_errors(path):
            path.unlink(missing_ok=True)


def _abandoned(folder: Path) -> Iterator[Path]:
    for name in list_names(folder):
        match = _PARTIAL.fullmatch(name)
        if match is None:
            continue
        path = folder / name
        if match["host"] == _host():
            if not process_is_alive(int(match["process"])):
                yield path
        elif path.exists() and time.time() - path.stat().st_mtime > _ABANDONED_S:
            yield path


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname()) or "localhost"
