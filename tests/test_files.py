"""Files are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridize import files
from hybridize.files import write_whole


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert write_whole(path, "é").read_bytes() == "é".encode()
    assert write_whole(path, b"\x00").read_bytes() == b"\x00"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = write_whole(tmp_path / "a.json", "old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_killed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a.json", "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from hybridize import files\n"
        "files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_whole(Path(sys.argv[1]), 'new')"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr
    assert path.read_text() == "old"


def test_it_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    replace = os.replace
    monkeypatch.setattr(files, "sync_file", lambda path: calls.append(f"sync {Path(path).is_dir()}"))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_whole(tmp_path / "a.json", "text")
    assert calls == ["sync False", "replace", "sync True"]
