"""A store of rows on disk by what they were computed from, shared by runs and processes that write at the same time."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint import fault_point, resource_errors
from hybridize.checkpoint.files import read_json_object
from hybridize.distillation.cache_shard import (
    Block,
    DamagedShardError,
    Shard,
    remove_partials,
    shard_names,
    write_shard,
)
from hybridize.distillation.settings import differences
from hybridize.errors import CheckpointError, RecipeError, ResourceError
from hybridize.files import write_whole
from hybridize.progress import SILENT, Reporter

IDENTITY_FILE = "teacher.json"
FORMAT = "hybridize-teacher-cache"
VERSION = 1
SHARD_BYTES = 64 * 2**20
"""Rows wait in memory until they make a shard of this size, or until `flush`."""
MAX_OPEN_SHARDS = 32
"""Each holds a file handle."""

_Source = Block | Shard


class CacheStore:
    """Rows of named tensors by kind and key::

        with CacheStore(folder, identity={"fingerprint": "...", "top_k": 64}) as store:
            rows = store.get("top-k", keys, ["ids"])["ids"]
            store.put("top-k", keys, {"ids": ids})

    What other processes write after the opening is not seen, so that the same run finds the same rows each time that
    it is at the same place. Two processes may compute and write the same row; either is as good as the other.

    Args:
        folder: is made if it does not exist.
        identity: what the values depend on beside their keys, as JSON values. A folder belongs to one.
        reporter: hears of damaged files.

    Attributes:
        hits, misses: rows that `get` had, and had not.

    Raises:
        RecipeError: the folder holds values of another identity; every difference is named. Or it is a file.
        CheckpointError: there are values and nobody can tell whose.
        ResourceError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, identity: Mapping[str, Any], reporter: Reporter = SILENT) -> None:
        self.folder = folder
        self.reporter = reporter
        self.hits = self.misses = 0
        self._index: dict[str, dict[bytes, tuple[tuple[_Source, int], ...]]] = {}
        self._shards: dict[str, Shard] = {}
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._waiting: dict[str, list[Block]] = {}
        _claim(folder, identity)
        remove_partials(folder)
        for name in shard_names(folder):
            self._find(name)

    # Reading.

    def get(self, kind: str, keys: Sequence[str], names: Collection[str]) -> dict[str, list[Tensor | None]]:
        """The tensors of rows, each on the CPU and None where there is none; they must not be written to.

        Args:
            kind: lower-case letters and hyphens.
            keys: of the rows, 64 hexadecimal digits each.
            names: of the tensors.
        """
        found: dict[str, list[Tensor | None]] = {name: [] for name in names}
        for key in keys:
            row = {name: self._row(kind, bytes.fromhex(key), name) for name in names}
            for name, tensor in row.items():
                found[name].append(tensor)
            is_hit = all(tensor is not None for tensor in row.values())
            self.hits += is_hit
            self.misses += not is_hit
        return found

    def _row(self, kind: str, key: bytes, name: str) -> Tensor | None:
        for source, index in self._index.get(kind, {}).get(key, ()):
            if name in source.names and (isinstance(source, Block) or self._opened(source)):
                return source.row(name, index)
        return None

    def _opened(self, shard: Shard) -> bool:
        """Whether the shard could be opened; one that is damaged is removed and forgotten."""
        try:
            shard.open()
        except CheckpointError as error:
            self._drop(shard.name, error)
            return False
        self._open[shard.name] = shard
        self._open.move_to_end(shard.name)
        while len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return True

    def _find(self, name: str) -> None:
        try:
            shard = Shard(self.folder, name)
            keys = shard.keys()
        except CheckpointError as error:
            self._drop(name, error)
            return
        self._add(shard, keys)

    def _add(self, shard: Shard, keys: Sequence[bytes]) -> None:
        self._shards[shard.name] = shard
        self._enter(shard.kind, shard, keys)

    def _enter(self, kind: str, source: _Source, keys: Sequence[bytes]) -> None:
        rows = self._index.setdefault(kind, {})
        for number, key in enumerate(keys):
            rows[key] = (*rows.get(key, ()), (source, number))

    def _leave(self, kind: str, source: _Source) -> None:
        rows = self._index.get(kind, {})
        # The keys in a damaged file may be anything, so all rows are looked through; it is rare.
        keys = source.keys if isinstance(source, Block) else list(rows)
        for key in keys:
            places = rows.get(key, ())
            if any(place[0] is source for place in places):
                left = tuple(place for place in places if place[0] is not source)
                if left:
                    rows[key] = left
                else:
                    del rows[key]

    def _drop(self, name: str, error: CheckpointError) -> None:
        """Forgets a file; one that does not hold what its name says is removed, for nothing will ever want it again."""
        shard = self._shards.pop(name, None)
        self._open.pop(name, None)
        if shard is not None:
            self._leave(shard.kind, shard)
        if isinstance(error, DamagedShardError):
            with suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)
        rows = f"its {shard.num_rows} rows" if shard is not None else "its rows"
        self.reporter.note(f"{self.folder / name}: {error.what} The teacher computes {rows} again.")

    # Writing.

    def put(self, kind: str, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Adds rows; those that are there stay as they are, and those that are not finite are not kept.

        Args:
            kind: lower-case letters and hyphens.
            keys: of the rows.
            tensors: by name, [rows, ...], on the CPU. They are kept, not copied.

        Raises:
            ResourceError: the disk is full. What was not written is still here, and nothing is half-written.
        """
        for block in self._new_blocks(kind, [bytes.fromhex(key) for key in keys], tensors):
            self._waiting.setdefault(kind, []).append(block)
            self._enter(kind, block, block.keys)
        if sum(block.size_bytes for blocks in self._waiting.values() for block in blocks) >= SHARD_BYTES:
            self.flush()

    def _new_blocks(self, kind: str, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> list[Block]:
        """A block for each set of names that rows lack; nearly always one, or none."""
        usable = _finite_rows(tensors, len(keys))
        rows_by_names: dict[frozenset[str], dict[bytes, int]] = {}
        for number, key in enumerate(keys):
            there = [source.names for source, _ in self._index.get(kind, {}).get(key, ())]
            lacking = frozenset(tensors).difference(*there)
            if usable[number] and lacking:
                rows_by_names.setdefault(lacking, {}).setdefault(key, number)
        return [
            Block(list(rows), {name: _select(tensors[name], list(rows.values())) for name in sorted(names)})
            for names, rows in rows_by_names.items()
        ]

    def flush(self) -> None:
        """Writes what waits in memory; when it returns, all rows are on disk.

        Raises:
            ResourceError: the disk is full. What was not written is still here, and nothing is half-written.
        """
        for kind, waiting in list(self._waiting.items()):
            groups: dict[Any, list[Block]] = {}
            for block in waiting:
                groups.setdefault(block.signature, []).append(block)
            for blocks in groups.values():
                shard = write_shard(self.folder, kind, blocks)
                for block in blocks:
                    waiting.remove(block)
                    self._leave(kind, block)
                self._add(shard, [key for block in blocks for key in block.keys])
            del self._waiting[kind]

    def close(self) -> None:
        """Writes what waits in memory, and closes the files."""
        self.flush()
        while self._open:
            self._open.popitem()[1].close()

    def facts(self) -> dict[str, int]:
        """What a log wants to know: rows and bytes in the store, hits and misses since the opening."""
        waiting = sum(block.size_bytes for blocks in self._waiting.values() for block in blocks)
        return {
            "rows": sum(len(rows) for rows in self._index.values()),
            "bytes": sum(shard.size_bytes for shard in self._shards.values()) + waiting,
            "hits": self.hits,
            "misses": self.misses,
        }

    def __enter__(self) -> CacheStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Rows are worth keeping when a run is stopped too; but the first error is the one to tell.
        with suppress(*((ResourceError,) if error is not None else ())):
            self.close()


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Makes the folder the identity's own, or compares it with whose it is."""
    wanted = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **identity}))
    path = folder / IDENTITY_FILE
    if folder.exists() and not folder.is_dir():
        hint = "Choose another distill.teacher_cache.folder."
        raise RecipeError("The teacher cache is not a folder.", where=str(folder), hint=hint)
    with resource_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = shard_names(folder)  # before the look at the file, which another process may just have written
        if not path.exists():
            if names:
                what = (
                    f"There are {len(names)} files of a teacher cache and no {IDENTITY_FILE} that says whose they are."
                )
                raise CheckpointError(what, where=str(folder), hint="Delete the folder; it is filled again.")
            fault_point("cache-identity")
            write_whole(path, json.dumps(wanted, indent=2, sort_keys=True) + "\n")
    changed = differences(read_json_object(folder, IDENTITY_FILE), wanted)
    if changed:
        what = f"The folder holds what another teacher said: {'; '.join(changed)}."
        hint = "Choose another distill.teacher_cache.folder, or delete this one; it is filled again."
        raise RecipeError(what, where=str(folder), hint=hint, problems=tuple(changed))


def _finite_rows(tensors: Mapping[str, Tensor], num_rows: int) -> list[bool]:
    """Which rows hold neither NaN nor infinity: once stored, one would end every later run at that row."""
    finite = torch.ones(num_rows, dtype=torch.bool)
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.numel():
            finite &= tensor.isfinite().reshape(num_rows, -1).all(-1)
    return finite.tolist()


def _select(tensor: Tensor, rows: list[int]) -> Tensor:
    return tensor if rows == list(range(len(tensor))) else tensor[rows]
