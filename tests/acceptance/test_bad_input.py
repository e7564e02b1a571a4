"""Bad input ends with the right exit code, one clear message, no traceback and nothing half-written.

Every case breaks one thing in a sound project and runs a command line, once for people and once with --json. The groups
are those of the goal table.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from hybridize.checkpoint import FolderLock, resources
from tests.acceptance import cases_of_commands, cases_of_files
from tests.acceptance.case import RUN, TEACHER, Case
from tests.checkpoint.files import snapshot
from tests.cli.conftest import Invoke

CASES = [*cases_of_files.CASES, *cases_of_commands.CASES]


@pytest.fixture
def project(sound: Path, hybrid: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(sound, tmp_path / "in")
    shutil.copytree(hybrid, tmp_path / "in" / "hybrid")
    return tmp_path / "in"


def refused(invoke: Invoke, project: Path, command: tuple[str, ...], code: int, says: tuple[str, ...]) -> None:
    """The command ends with `code`, says one thing on one stream, and nothing on disk is different afterwards."""
    places = {"in": str(project), "out": str(project.parent / "out")}
    arguments = [argument.format(**places) for argument in command]
    before = snapshot(project.parent)
    plain = invoke(*arguments)
    assert plain.code == code, plain
    lines = plain.err.splitlines()
    first = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(first) == 1, plain.err
    message = "\n".join(lines[first[0] :])
    assert "Traceback" not in plain.err
    assert "  → " in message
    assert plain.out == ""
    for words in says:
        assert words in message
    assert snapshot(project.parent) == before

    told = invoke(*arguments, "--json")
    assert told.code == code
    assert told.json.keys() == {"schema", "error"}
    error = told.json["error"]
    assert error["exit_code"] == code
    assert error["message"].strip()
    assert error["hint"].strip()
    assert error["where"].strip() or code == 2
    assert "error:" not in told.err
    assert "Traceback" not in told.out + told.err
    for words in says:
        assert words in f"{error['where']}: {error['message']} {error['hint']}"
    assert snapshot(project.parent) == before


def test_the_table_is_large_and_its_ids_differ() -> None:
    names = [case.id for case in CASES]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.timeout(60)  # a pipe that is waited for would end here
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_input(case: Case, invoke: Invoke, project: Path) -> None:
    case.breaks(project)
    refused(invoke, project, case.command, case.code, case.says)
    assert not (project / "canary").exists()


@pytest.mark.parametrize("command", [TEACHER, RUN], ids=["convert", "run"])
@pytest.mark.parametrize("fault", ["before-manifest:ENOSPC", "shard:ENOSPC", "shard:EMFILE", "before-rename:EROFS"])
def test_vi_exhausted_while_writing(
    command: tuple[str, ...], fault: str, invoke: Invoke, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridize.checkpoint import faults

    class Always(dict[str, int]):
        """Every pass through the point is the first."""

        def get(self, key: str, default: int = 0) -> int:  # type: ignore[override]
            return 0

    monkeypatch.setattr(faults, "_passes", Always())
    monkeypatch.setenv("HYBRIDIZE_FAULT", fault)
    words = {"ENOSPC": "disk is full", "EMFILE": "Too many files", "EROFS": "read-only"}
    refused(invoke, project, command, 5, (words[fault.rpartition(":")[2]],))


@pytest.mark.parametrize("command", [TEACHER, RUN], ids=["convert", "run"])
def test_vi_disk_full_at_the_start(
    command: tuple[str, ...], invoke: Invoke, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    refused(invoke, project, command, 5, ("GiB of free disk",))


@pytest.mark.parametrize("command", [TEACHER, RUN], ids=["convert", "run"])
def test_vi_memory_of_the_bill_is_above_the_machines(
    command: tuple[str, ...], invoke: Invoke, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "memory_limit_bytes", lambda: 2**28)
    refused(invoke, project, command, 5, ("GiB of memory", "0.25 GiB"))


@pytest.mark.parametrize("command", [TEACHER, RUN], ids=["convert", "run"])
def test_vi_output_below_a_file(command: tuple[str, ...], invoke: Invoke, project: Path) -> None:
    (project.parent / "out").write_text("mine")
    refused(invoke, project, command, 2, ("not a folder",))


@pytest.mark.parametrize("command", [TEACHER, RUN], ids=["convert", "run"])
def test_vi_output_that_may_not_be_written(
    command: tuple[str, ...], invoke: Invoke, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs the tests may write everywhere, so the system's refusal is simulated."""
    mkdir = Path.mkdir

    def refuse(self: Path, *args: object, **options: object) -> None:
        if self.name.startswith("out"):
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused(invoke, project, command, 5, ("out",))


@pytest.mark.parametrize("command", [TEACHER, RUN], ids=["convert", "run"])
def test_v_occupied_output(command: tuple[str, ...], invoke: Invoke, project: Path) -> None:
    (project.parent / "out").mkdir()
    (project.parent / "out" / "mine.txt").write_text("mine")
    refused(invoke, project, command, 2, ("not empty", "--out"))


@pytest.mark.parametrize("command", [TEACHER, ("export", "{in}/hybrid", "--out", "{out}")], ids=["convert", "export"])
def test_v_output_of_a_living_process(command: tuple[str, ...], invoke: Invoke, project: Path) -> None:
    with FolderLock(project.parent / "out"):
        refused(invoke, project, command, 2, (f"process {os.getpid()}",))
    assert invoke("-q", *(text.format(**{"in": project, "out": project.parent / "out"}) for text in command)).code == 0


def test_v_run_of_a_living_process(invoke: Invoke, project: Path) -> None:
    """A run that another process is converting stays as it is, and goes on when that process has gone."""
    run = project.parent / "out"
    less = (*RUN, "--set", "distill=null", "--set", "evaluate.perplexity=null")
    arguments = [text.format(**{"in": project, "out": run}) for text in less]
    assert invoke("-q", *arguments).code == 0
    (run / "converted" / "manifest.json").unlink()
    with FolderLock(run / "converted"):
        refused(invoke, project, less, 2, ("being written", f"process {os.getpid()}"))
    assert invoke("-q", *arguments).code == 0
    assert invoke("verify", run / "converted").code == 0


def test_i_what_must_work(invoke: Invoke, project: Path) -> None:
    """A tied head is absent from both teachers, and a window longer than the context is a warning."""
    for teacher in ("teacher", "sharded"):
        assert "lm_head" not in str(invoke("inspect", project / teacher, "--tensors", "--json").json["tensor_list"])
        result = invoke(
            "plan", project / "recipe.yaml", "--model", project / teacher, "--set", "mixers.T.window_tokens=90"
        )
        assert result.code == 0
        assert result.err.startswith("warning: layers 1: token_eviction:")


def test_xi_stdout_holds_the_result_and_nothing_else(project: Path) -> None:
    """Of a process of its own, as a script would use it."""
    command = [sys.executable, "-m", "hybridize", "verify", str(project / "hybrid"), "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith('{\n  "schema": "hybridize/verify/1"')
    assert done.stderr == ""
