"""Two processes that distil together, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distillation import runs

ROOT = Path(__file__).resolve().parents[2]
Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    runs.prepare(folder)
    for name in ("straight", "stopped", "broken"):
        shutil.copytree(folder / "run", folder / name)
    return folder


@pytest.fixture(scope="module")
def told(folder: Path) -> Told:
    """What each of the two processes saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    script = str(Path(__file__).with_name("two_processes.py"))
    processes = [
        subprocess.Popen([sys.executable, script, str(folder)], env={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]


def test_processes_drop_out_differently_and_keep_equal_weights(told: Told) -> None:
    first, second = (process["straight"]["steps"] for process in told)
    assert [step for step, _, _ in first] == [step for step, _, _ in second] == list(range(1, 8))
    assert all(one[1] != two[1] for one, two in zip(first, second, strict=True))  # random states
    assert all(one[2] == two[2] for one, two in zip(first, second, strict=True))  # weights


def test_a_signal_to_one_stops_both_and_they_go_on_as_if_none_had_come(told: Told, folder: Path) -> None:
    for process in told:
        assert process["stopped"]["error"] == "StoppedError"
        assert [*process["stopped"]["steps"], *process["resumed"]["steps"]] == process["straight"]["steps"]
    weights = [folder / run / "distill" / "adapter" / "adapter_model.safetensors" for run in ("straight", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_loss_that_is_not_finite_in_one_ends_both(told: Told, folder: Path) -> None:
    assert [process["broken"]["error"] for process in told] == ["NumbersError", "NumbersError"]
    assert "another process" in told[0]["broken"]["what"]
    assert "is not finite (nan)" in told[1]["broken"]["what"]
    assert [path.name for path in (folder / "broken" / "distill").glob("failure*")] == ["failure-1.json"]
