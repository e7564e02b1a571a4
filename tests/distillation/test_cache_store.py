"""The store of the teacher cache: what was put is found, whoever wrote it and however the writer ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridize.checkpoint import faults, sha256_bytes
from hybridize.distillation import cache_shard, cache_store
from hybridize.distillation.cache_store import IDENTITY_FILE, CacheStore
from hybridize.errors import CheckpointError, RecipeError, ResourceError

IDENTITY = {"fingerprint": "f" * 64, "dtype": "float32", "top_k": 4}
KIND = "top-k"
LENGTH = 5


class Notes:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, total: float | None) -> Iterator[Any]:
        yield None

    def note(self, message: str) -> None:
        self.notes.append(message)


def key(number: int) -> str:
    return sha256_bytes(str(number).encode())


def rows(*numbers: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Tensors of these rows; each element tells its row."""
    values = torch.tensor(numbers, dtype=torch.float32)[:, None, None] + torch.arange(length * 2).view(length, 2) / 16
    return {"ids": values.to(torch.int16), "mass": values[..., 0].contiguous(), "relative": values.half()}


def put(store: CacheStore, *numbers: int, length: int = LENGTH) -> None:
    store.put(KIND, [key(number) for number in numbers], rows(*numbers, length=length))


def held(store: CacheStore, *numbers: int, length: int = LENGTH) -> list[bool]:
    """Which rows the store has; what it has is compared with what was put."""
    expected = rows(*numbers, length=length)
    found = store.get(KIND, [key(number) for number in numbers], list(expected))
    for name, wanted in expected.items():
        for there, row in zip(found[name], wanted, strict=True):
            assert there is None or (there.dtype == row.dtype and torch.equal(there, row))
    present = [[tensor is not None for tensor in found[name]] for name in expected]
    assert all(of_name == present[0] for of_name in present)
    return present[0]


def whole(found: list[Tensor | None]) -> Tensor:
    """Rows that are all there, as one tensor."""
    return torch.stack([row for row in found if row is not None])


def open_store(folder: Path, **changes: Any) -> CacheStore:
    return CacheStore(folder, identity=IDENTITY, **changes)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("top-k.*.safetensors"))


def test_rows_are_found_before_and_after_they_are_written(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, 1, 2)
        put(store, 3, length=9)  # another shape in the same store
        assert held(store, 2, 1, 4) == [True, True, False]
        store.flush()
        assert held(store, 2, 1, 4) == [True, True, False]
    assert len(shards(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path not in shards(tmp_path)) == [IDENTITY_FILE]
    with open_store(tmp_path) as store:
        assert held(store, 2, 1, 4) == [True, True, False]
        assert held(store, 3, length=9) == [True]
        facts = store.facts()
    assert (facts["rows"], facts["hits"], facts["misses"]) == (3, 3, 1)
    assert facts["bytes"] == sum(path.stat().st_size for path in shards(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8])
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (torch.randn(3, 4, 2) * 50).to(dtype)
    keys = [key(number) for number in range(3)]
    with open_store(tmp_path) as store:
        store.put("layer-inputs", keys, {"7": tensor})
    with open_store(tmp_path) as store:
        found = store.get("layer-inputs", keys, ["7"])["7"]
        assert torch.equal(whole(found), tensor)
        assert store.get("top-k", keys, ["7"])["7"] == [None] * 3


def test_names_may_come_one_after_the_other(tmp_path: Path) -> None:
    keys = [key(1), key(2)]
    three, seven = torch.randn(2, 4), torch.randn(2, 4)
    with open_store(tmp_path) as store:
        store.put("layer-inputs", keys[:1], {"3": three[:1]})
    with open_store(tmp_path) as store:
        assert store.get("layer-inputs", keys, ["3", "7"])["7"] == [None, None]
        store.put("layer-inputs", keys, {"3": three + 1, "7": seven})  # of row 1 the old "3" stays
    with open_store(tmp_path) as store:
        found = store.get("layer-inputs", keys, ["3", "7"])
        assert torch.equal(whole(found["3"]), torch.stack([three[0], three[1] + 1]))
        assert torch.equal(whole(found["7"]), seven)
        assert store.facts()["hits"] == 2


def test_a_row_that_is_there_stays_and_is_written_once(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, 1, 1)
        store.put(KIND, [key(1)], {name: tensor + 1 for name, tensor in rows(1).items()})
        store.flush()
        size = store.facts()["bytes"]
        put(store, 1)
        store.flush()
        assert held(store, 1) == [True]
        assert store.facts()["bytes"] == size


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), max_size=6), st.integers(1, 400))
def test_property_store_is_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    written: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_store, "SHARD_BYTES", size)
        patch.setattr(cache_store, "MAX_OPEN_SHARDS", 1)
        with open_store(folder) as store:
            for batch in batches:
                put(store, *batch)
                written |= set(batch)
                assert held(store, *range(7)) == [number in written for number in range(7)]
        with open_store(folder) as store:
            assert held(store, *range(7)) == [number in written for number in range(7)]
            assert store.facts()["rows"] == len(written)


def test_a_row_outlives_the_mapping_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "SHARD_BYTES", 1)
    monkeypatch.setattr(cache_store, "MAX_OPEN_SHARDS", 2)
    with open_store(tmp_path) as store:
        for number in range(5):
            put(store, number)
        assert len(shards(tmp_path)) == 5
        names = list(rows(0))
        taken = [store.get(KIND, [key(number)], names) for number in range(5)]
        assert len(store._open) == 2
    for number, row in enumerate(taken):
        assert torch.equal(whole(row["relative"]), rows(number)["relative"])


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    bad = rows(1, 2, 3)
    bad["mass"][0, 0], bad["relative"][2, 1, 1] = float("nan"), float("inf")
    with open_store(tmp_path) as store:
        store.put(KIND, [key(number) for number in (1, 2, 3)], bad)
        assert held(store, 1, 2, 3) == [False, True, False]


# Whose folder it is.


def test_another_identity_is_refused_and_named(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, 1)
    before = (tmp_path / IDENTITY_FILE).read_bytes()
    with pytest.raises(RecipeError, match=r"top_k: 4 → 8.*teacher_cache\.folder") as caught:
        CacheStore(tmp_path, identity={**IDENTITY, "top_k": 8})
    assert caught.value.problems == ("top_k: 4 → 8",)
    with pytest.raises(RecipeError, match="fingerprint"):
        CacheStore(tmp_path, identity={**IDENTITY, "fingerprint": "0" * 64})
    assert (tmp_path / IDENTITY_FILE).read_bytes() == before
    with open_store(tmp_path) as store:
        assert held(store, 1) == [True]


def test_files_of_an_unknown_teacher_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, 1)
    (tmp_path / IDENTITY_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"no {IDENTITY_FILE}"):
        open_store(tmp_path)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(RecipeError, match="not a folder"):
        open_store(tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "mine"


# Writers that end early, and several at once.


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Children start from a clean process that has torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.distillation.test_cache_store"])
    return context


def write_rows(folder: Path, numbers: tuple[int, ...], fault: str | None = None) -> None:
    if fault is not None:
        os.environ["HYBRIDIZE_FAULT"] = fault
    cache_store.SHARD_BYTES = 1
    with open_store(folder) as store:
        for number in numbers:
            put(store, number)


@pytest.mark.parametrize(
    ("fault", "whole"),
    [
        ("cache-identity:kill", 0),
        ("shard:kill:1", 0),
        ("shard:kill:3", 2),
        ("cache-before-rename:kill:2", 1),
        ("cache-after-rename:kill:2", 2),
    ],
)
def test_killed_writer_leaves_whole_shards_only(
    fault: str, whole: int, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    child = processes.Process(target=write_rows, args=(tmp_path, (0, 1, 2, 3), fault))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert len(shards(tmp_path)) == whole
    notes = Notes()
    with open_store(tmp_path, reporter=notes) as store:
        assert held(store, *range(4)) == [number < whole for number in range(4)]
        assert not list(tmp_path.glob(".*"))
        put(store, *range(4))
    with open_store(tmp_path, reporter=notes) as store:
        assert held(store, *range(4)) == [True] * 4
    assert notes.notes == []


def test_two_writers_at_once(tmp_path: Path, processes: multiprocessing.context.ForkServerContext) -> None:
    children = [processes.Process(target=write_rows, args=(tmp_path, part)) for part in ((0, 1, 2, 3), (2, 3, 4, 5))]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    with open_store(tmp_path) as store:
        assert held(store, *range(7)) == [True] * 6 + [False]
    assert len(shards(tmp_path)) == 6  # equal rows give equal files
    assert not list(tmp_path.glob(".*"))


def test_what_a_living_writer_is_at_stays(tmp_path: Path) -> None:
    host = cache_shard._host()
    living = tmp_path / f".{host}-{os.getppid()}-0123abcd.partial.safetensors"
    elsewhere = tmp_path / ".other.host-17-0123abcd.partial.safetensors"
    old = tmp_path / ".other.host-18-0123abcd.partial.safetensors"
    foreign = tmp_path / ".notes.safetensors"
    for path in (living, elsewhere, old, foreign):
        path.write_text("…")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    with open_store(tmp_path):
        assert sorted(tmp_path.glob(".*")) == sorted([living, elsewhere, foreign])


@pytest.mark.parametrize("reason", ["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("point", ["shard", "cache-before-rename"])
def test_full_disk(point: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_passes", {})
    monkeypatch.setenv("HYBRIDIZE_FAULT", f"{point}:{reason}:2")
    with open_store(tmp_path) as store:
        put(store, 1)
        store.flush()
        put(store, 2)
        with pytest.raises(ResourceError) as caught:
            store.flush()
        assert caught.value.exit_code == 5
        assert len(shards(tmp_path)) == 1
        assert not list(tmp_path.glob(".*"))
        assert held(store, 1, 2) == [True, True]  # nothing was lost, and once there is room it is written
    with open_store(tmp_path) as store:
        assert held(store, 1, 2) == [True, True]


def test_the_first_error_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_passes", {})
    monkeypatch.setenv("HYBRIDIZE_FAULT", "shard:ENOSPC:1")

    def stopped() -> None:
        with open_store(tmp_path) as store:
            put(store, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not shards(tmp_path)


# Damage.


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", ["body", "key", "length", "truncated"])
def test_damaged_shard_is_missing_once(place: str, tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, 1, 2)
        store.flush()
        put(store, 3)
    path = next(
        path for path in shards(tmp_path) if path.stat().st_size == max(p.stat().st_size for p in shards(tmp_path))
    )
    if place == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    else:  # the keys are the narrowest elements, which come last
        damage(path, {"body": -2 * 32 - 1, "key": -1, "length": 0}[place])
    notes = Notes()
    with open_store(tmp_path, reporter=notes) as store:
        assert held(store, 3, 1, 2, 1) == [True, False, False, False]
        assert len(notes.notes) == 1
        assert "computes its" in notes.notes[0]
        assert not path.exists()
        put(store, 1, 2)
    with open_store(tmp_path, reporter=notes) as store:
        assert held(store, 1, 2, 3) == [True, True, True]
    assert len(notes.notes) == 1


def test_a_shard_that_somebody_removed(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, 1)
    notes = Notes()
    with open_store(tmp_path, reporter=notes) as store:
        shards(tmp_path)[0].unlink()
        assert held(store, 1) == [False]
        assert len(notes.notes) == 1


def test_another_copy_of_a_damaged_row_is_taken(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, open_store(tmp_path) as other:
        put(store, 1)
        put(other, 1, 2)
    assert len(shards(tmp_path)) == 2
    damage(shards(tmp_path)[0], -70)
    notes = Notes()
    with open_store(tmp_path, reporter=notes) as store:
        assert held(store, 1) == [True]
        assert len(notes.notes) == 1
