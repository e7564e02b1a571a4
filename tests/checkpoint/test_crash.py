"""Group V: a killed writer leaves the old folder or none, and the same command then completes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from hybridize.checkpoint import AtomicFolder, FolderLock, load_state, resolve_source, verify_folder
from hybridize.errors import UsageError
from tests.checkpoint.child import tensors, write
from tests.checkpoint.files import snapshot

POINTS = ["shard:kill", "shard:kill:3", "between-shards:kill", "before-manifest:kill", "before-rename:kill"]


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Children start from a clean process that has torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.checkpoint.child"])
    return context


def run_killed(processes: multiprocessing.context.ForkServerContext, out: Path, value: float, fault: str) -> int:
    child = processes.Process(target=write, args=(out, value, fault))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    return child.pid or 0


def assert_holds(out: Path, value: float) -> None:
    assert verify_folder(out).num_tensors == 5
    state = load_state(resolve_source(out))
    for name, tensor in tensors(value).items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("fault", POINTS)
def test_killed_first_write_leaves_no_folder(
    fault: str, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    out = tmp_path / "out"
    pid = run_killed(processes, out, 1.0, fault)
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.lock", f"out.partial-{pid}"]
    write(out, 1.0)
    assert_holds(out, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("fault", POINTS)
def test_killed_overwrite_leaves_the_old_folder(
    fault: str, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    out = tmp_path / "out"
    write(out, 1.0)
    before = snapshot(out)
    run_killed(processes, out, 2.0, fault)
    assert snapshot(out) == before
    write(out, 2.0)
    assert_holds(out, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_after_the_rename_the_new_folder_is_there(
    tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    out = tmp_path / "out"
    write(out, 1.0)
    run_killed(processes, out, 2.0, "after-rename:kill")
    assert_holds(out, 2.0)
    write(out, 3.0)
    assert_holds(out, 3.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_between_the_two_renames_the_old_folder_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, 1.0)
    out.rename(tmp_path / "out.old-999999999")  # what a system without exchange leaves between its two renames
    with pytest.raises(UsageError, match="not empty"):
        AtomicFolder(out).__enter__()
    assert_holds(out, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def hold(out: Path, ready: str) -> None:
    with FolderLock(out):
        Path(ready).touch()
        time.sleep(60)


def test_second_writer_is_refused_and_a_dead_one_is_not_waited_for(
    tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    out, ready = tmp_path / "out", tmp_path / "ready"
    child = processes.Process(target=hold, args=(out, str(ready)))
    child.start()
    while not ready.exists():
        assert child.is_alive()
        time.sleep(0.01)
    with pytest.raises(UsageError, match=f"process {child.pid}"):
        write(out, 1.0)
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial-*"))
    child.kill()
    child.join(60)
    assert (tmp_path / "out.lock").exists()
    write(out, 1.0)
    assert_holds(out, 1.0)
    assert not (tmp_path / "out.lock").exists()


def test_lock_of_a_reused_process_id_is_stale(tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text(f"{os.getppid()} 1\n")
    write(tmp_path / "out", 1.0)
    assert_holds(tmp_path / "out", 1.0)


def test_lock_of_a_living_process_without_flock_is_respected(tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text(f"{os.getppid()}\n")
    with pytest.raises(UsageError, match=f"process {os.getppid()}"):
        write(tmp_path / "out", 1.0)
    assert (tmp_path / "out.lock").read_text() == f"{os.getppid()}\n"


def test_same_process_cannot_write_twice_at_once(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "out"), pytest.raises(UsageError, match="being written"):
        write(tmp_path / "out", 1.0)


def test_partial_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    living = tmp_path / f"out.partial-{os.getppid()}"
    living.mkdir()
    (tmp_path / "out.partial-notes").mkdir()
    write(tmp_path / "out", 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", living.name, "out.partial-notes"])
