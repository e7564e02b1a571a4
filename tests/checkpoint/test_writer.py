"""Writing: shards, bytes, umask, refusals, exhaustion, and folders that cannot be renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hybridize.checkpoint import (
    AtomicFolder,
    check_folder,
    faults,
    load_state,
    read_manifest,
    require_free_disk,
    resolve_source,
    save_tensors,
    verify_folder,
    write_manifest,
    writer,
)
from hybridize.errors import CheckpointError, ResourceError, UsageError, VerificationError
from tests.checkpoint.child import tensors, write
from tests.checkpoint.files import snapshot


def test_others_read_what_is_written(tmp_path: Path) -> None:
    state = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.randn(3, 2).t(),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "none": torch.zeros(0, 4),
        "half": torch.randn(5).half(),
    }
    assert save_tensors(tmp_path, state) == ["model.safetensors"]
    read = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_bytes_do_not_depend_on_order_or_time(tmp_path: Path) -> None:
    for name, pairs in (("one", tensors(1.0).items()), ("two", reversed(tensors(1.0).items()))):
        with AtomicFolder(tmp_path / name, kind="converted", provenance={"b": 1, "a": 2}) as folder:
            save_tensors(folder, pairs, max_shard_bytes=128)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1]


def test_one_file_and_shards_hold_the_same(tmp_path: Path) -> None:
    for name, limit in (("one", 1e9), ("many", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        save_tensors(tmp_path / name, tensors(1.0), max_shard_bytes=limit)
    assert len(list((tmp_path / "many").glob("model-*-of-00005.safetensors"))) == 5
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    states = [load_state(resolve_source(tmp_path / name)) for name in ("one", "many")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    check_folder(resolve_source(tmp_path / "many"))


def test_tied_tensors_are_left_out_by_name(tmp_path: Path) -> None:
    embedding = torch.randn(4, 4)
    save_tensors(tmp_path, {"embed": embedding, "lm_head": embedding}, skip=["lm_head"])
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == {"embed"}


def test_umask_is_respected(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(tmp_path / "out", 1.0)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_manifest_tells_what_was_written(tmp_path: Path) -> None:
    out = AtomicFolder(tmp_path / "out", kind="export", provenance={"recipe": "r"})
    with out as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        (folder / ".hidden").write_text("not ours")
        out.provenance["step"] = 3
    manifest = read_manifest(tmp_path / "out")
    assert manifest.kind == "export"
    assert manifest.provenance == {"recipe": "r", "step": 3}
    assert list(manifest.files) == ["sub/a.txt"]
    assert manifest.files["sub/a.txt"].size_bytes == 1
    assert verify_folder(tmp_path / "out").num_files == 1
    assert out.notes == []


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        (lambda out: (out / "config.json").unlink(), "missing: config.json"),
        (lambda out: (out / "config.json").write_text("{}"), "changed: config.json"),
        (lambda out: (out / "new.txt").write_text("x"), "not in the manifest: new.txt"),
    ],
    ids=["missing", "changed", "extra"],
)
def test_verify_names_the_file(change: object, mention: str, tmp_path: Path) -> None:
    write(tmp_path / "out", 1.0)
    assert callable(change)
    change(tmp_path / "out")
    with pytest.raises(VerificationError, match=mention):
        verify_folder(tmp_path / "out")


def test_extra_files_may_be_allowed(tmp_path: Path) -> None:
    write(tmp_path / "out", 1.0)
    (tmp_path / "out" / "report.html").write_text("x")
    verify_folder(tmp_path / "out", allow_extra=["report.html"])


@pytest.mark.parametrize(
    "document",
    [
        None,
        {},
        {"format": "other"},
        {"format": "hybridize-manifest", "version": 2},
        {"format": "hybridize-manifest", "version": 1, "kind": "x"},
        {"format": "hybridize-manifest", "version": 1, "kind": "x", "files": {"a": 1}},
        {"format": "hybridize-manifest", "version": 1, "kind": "x", "files": {"a": {"sha256": "0", "size_bytes": 1}}},
        {"format": "hybridize-manifest", "version": 1, "kind": "x", "files": {"../a": {}}},
    ],
    ids=["none", "empty", "other", "newer", "no-files", "no-record", "short-hash", "hostile-name"],
)
def test_bad_manifest(document: object, tmp_path: Path) -> None:
    if document is not None:
        (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        verify_folder(tmp_path)
    assert caught.value.hint


def test_manifest_of_other_tools_is_no_manifest_of_ours(tmp_path: Path) -> None:
    from hybridize.checkpoint import require_usable_weights
    from tests.checkpoint.files import single

    folder = single(tmp_path / "model")
    (folder / "manifest.json").write_text('{"name": "something else"}')
    assert require_usable_weights(resolve_source(folder)).num_tensors == 4


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_existing_output_is_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("precious")
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError) as caught, AtomicFolder(out):
        pytest.fail("the block must not run")
    assert caught.value.where == str(out)
    assert "--o" in caught.value.hint
    assert snapshot(tmp_path) == before


def test_empty_output_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", 1.0)
    write(tmp_path / "a" / "b" / "out", 1.0)
    verify_folder(tmp_path / "empty")
    verify_folder(tmp_path / "a" / "b" / "out")


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UsageError])
def test_an_exception_leaves_nothing_new(error: type[BaseException], old: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if old:
        write(out, 1.0)
    before = snapshot(tmp_path)

    def fail() -> None:
        with AtomicFolder(out, overwrite=True) as folder:
            save_tensors(folder, tensors(2.0))
            raise error("x")

    with pytest.raises(error):
        fail()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two-renames"])
def test_overwrite_replaces_everything(can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(writer, "_exchange", lambda first, second: False)
    out = tmp_path / "out"
    write(out, 1.0)
    with AtomicFolder(out, overwrite=True) as folder:
        (folder / "only.txt").write_text("x")
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "only.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EXDEV, errno.EPERM])
def test_rename_unsupported_falls_back_to_manifest_last(
    number: int, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if old:
        write(out, 1.0)
        (out / "old.txt").write_text("x")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer, "_rename", refuse)
    monkeypatch.setattr(writer, "_exchange", lambda first, second: False)
    monkeypatch.setattr(faults, "_passes", {})
    monkeypatch.setenv("HYBRIDIZE_FAULT", "before-copied-manifest:ENOSPC")
    with pytest.raises(ResourceError):
        write(out, 3.0)
    assert (out / "model.safetensors.index.json").exists()
    with pytest.raises(CheckpointError, match="not to its end"):
        read_manifest(out)
    folder_writer = AtomicFolder(out, overwrite=True)
    with folder_writer as folder:
        save_tensors(folder, tensors(2.0))
    monkeypatch.undo()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.safetensors"]
    verify_folder(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (note,) = folder_writer.notes
    assert "copied" in note


def test_disk_full_at_start_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="free disk") as caught:
        require_free_disk(tmp_path / "not" / "yet", shutil.disk_usage(tmp_path).free * 2)
    assert caught.value.where == str(tmp_path)
    require_free_disk(tmp_path, 1)


def test_save_asks_for_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 * 64))  # 1.1 times is not free
    with pytest.raises(ResourceError, match="free disk"):
        save_tensors(tmp_path, tensors(1.0))
    assert list(tmp_path.iterdir()) == []


def test_disk_full_in_a_shard_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, 1.0)
    before = snapshot(tmp_path)

    def fill() -> None:
        with AtomicFolder(out, overwrite=True) as folder:
            (folder / "model.safetensors").symlink_to("/dev/full")  # a file on which every write finds the disk full
            save_tensors(folder, tensors(2.0))

    with pytest.raises(ResourceError, match="disk is full") as caught:
        fill()
    assert "model.safetensors" in caught.value.where
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EMFILE", "EROFS", "EACCES"])
@pytest.mark.parametrize("point", ["shard", "between-shards", "before-manifest", "before-rename"])
def test_exhaustion_at_every_point(point: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_passes", {})
    monkeypatch.setenv("HYBRIDIZE_FAULT", f"{point}:{name}")
    with pytest.raises(ResourceError) as caught:
        write(tmp_path / "out", 1.0)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_disk_full_in_the_callers_own_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="disk is full"), AtomicFolder(tmp_path / "out"):
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_read_only_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceError, match="read-only"), AtomicFolder(tmp_path / "out"):
        pytest.fail("the block must not run")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_too_many_open_files(tmp_path: Path) -> None:
    def use_up() -> None:
        with AtomicFolder(tmp_path / "out") as folder:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            save_tensors(folder, tensors(1.0))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    try:
        with pytest.raises(ResourceError, match="ulimit"):
            use_up()
        for descriptor in held:
            os.close(descriptor)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_write_manifest_refuses_numbers_that_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_manifest(tmp_path, "export", {"loss": float("nan")})
