"""The manifest: written whole or not at all, and put right for single files only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hybridize.checkpoint import read_manifest, replace_in_manifest, verify_folder, write_manifest
from hybridize.errors import CheckpointError, ResourceError, VerificationError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("old")
    (tmp_path / "data.bin").write_text("whole")
    write_manifest(tmp_path, "export", {"teacher": "t"})
    return tmp_path


@pytest.mark.parametrize(
    "again", [lambda f: write_manifest(f, "other"), lambda f: replace_in_manifest(f, ["README.md"])]
)
def test_a_manifest_that_cannot_be_written_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, again
) -> None:
    before = (folder / "manifest.json").read_bytes()
    (folder / "README.md").write_text("new")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ResourceError):
        again(folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["README.md", "data.bin", "manifest.json"]


def test_only_the_named_files_are_hashed_again(folder: Path) -> None:
    before = read_manifest(folder)
    (folder / "README.md").write_text("new")
    (folder / "data.bin").write_text("rotten")
    after = replace_in_manifest(folder, ["README.md"])
    assert after == read_manifest(folder)
    assert (after.kind, after.provenance, after.created_by) == (before.kind, before.provenance, before.created_by)
    assert after.files["data.bin"] == before.files["data.bin"]
    assert after.files["README.md"] != before.files["README.md"]
    with pytest.raises(VerificationError, match=r"changed: data\.bin\)"):
        verify_folder(folder)


def test_a_file_that_is_not_there_is_refused(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    for name in ("absent.txt", "../README.md"):
        with pytest.raises(CheckpointError):
            replace_in_manifest(folder, [name])
    assert (folder / "manifest.json").read_bytes() == before
