"""Processes that distil together, on the CPU: two in one pair that goes through many runs, and the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybridize.distillation import processes as processes_module
from hybridize.distillation.processes import fit_processes, losses_told, start_processes
from hybridize.distillation.sharding import Sharding, requested_sharding
from hybridize.distillation.trainer import Trainer
from hybridize.errors import ProcessLostError, RecipeError, StoppedError, UsageError
from hybridize.recipe.schema import Distill, Stage
from tests.distillation import runs, two_processes

ROOT = Path(__file__).resolve().parents[2]
Told = list[dict[str, Any]]
TIMEOUT_S = 300.0


def start_pair(arguments: list[str], **options: Any) -> list[subprocess.Popen[str]]:
    """Two processes of one command, as torchrun starts them."""
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        first_port, second_port = one.getsockname()[1], other.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(first_port),
        "SECOND_PORT": str(second_port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        processes_module.TIMEOUT_VARIABLE: str(TIMEOUT_S),
    }
    return [
        subprocess.Popen([sys.executable, *arguments], env={**shared, "RANK": rank, "LOCAL_RANK": rank}, **options)
        for rank in ("0", "1")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared runs, one that a single process made of the exact recipe, and two that it left in the middle."""
    from hybridize.model.convert import convert
    from hybridize.plan import plan
    from tests.cli.conftest import RECIPE

    folder = tmp_path_factory.mktemp("two")
    runs.prepare(folder)
    exact = two_processes.exact_recipe(folder, 1)
    convert(plan(exact, offline=True), folder / "alone" / "converted")
    for name in two_processes.RUNS:
        shutil.copytree(folder / "run", folder / name)
    for name in (*two_processes.EXACT_RUNS, "alone-to-pair"):
        shutil.copytree(folder / "alone", folder / name)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    runs.distil(folder, exact, "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped_in(two_processes.STOP_STEP))
        with pytest.raises(StoppedError):
            runs.distil(folder, exact, "alone-to-pair")
    shutil.copytree(folder / "alone-to-pair", folder / "alone-to-sharded")
    return folder


def stopped_in(step: int) -> Any:
    """A trainer's step that asks for the end when that step begins."""
    queue = Trainer._step

    def stepped(self: Trainer, *args: Any) -> Any:
        if self.progress.step + 1 == step:
            self.stop.signal = signal.SIGTERM
        return queue(self, *args)

    return stepped


@pytest.fixture(scope="module")
def told(folder: Path) -> Told:
    """What the two processes saw; of the second, what it told before it was killed."""
    script = str(Path(__file__).with_name("two_processes.py"))
    pair = start_pair([script, str(folder)])
    try:
        deadline = time.monotonic() + 200
        while any(process.poll() is None for process in pair):
            assert time.monotonic() < deadline
            assert pair[0].poll() in (None, 0)  # the other one would wait for it
            assert pair[1].poll() in (None, -signal.SIGKILL)
            time.sleep(0.1)
    finally:
        for process in pair:
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
    for run in ("broken", "sharded-broken"):
        assert [process[run]["error"] for process in told] == ["NumbersError", "NumbersError"]
        assert "another process" in told[0][run]["what"]
        assert "is not finite (nan)" in told[1][run]["what"]
        assert [path.name for path in (folder / run / "distill").glob("failure*")] == ["failure-1.json"]


# One process with batches of 2 b, and two with b.


def test_two_processes_learn_what_one_does_sharded_or_not(told: Told, folder: Path) -> None:
    assert told[0]["pair"]["sharded"] == 0 < told[0]["sharded"]["sharded"]
    for run, stop in (("pair", two_processes.STOP_STEP), ("sharded", 2)):
        for process in told:
            steps = [*process[run]["steps"], *process[f"{run}-resumed"]["steps"]]
            assert [step for step, _, _ in steps] == list(range(1, 8))
            assert len(process[run]["steps"]) == stop
            assert [weights for *_, weights in steps] == [
                weights for *_, weights in told[0][run]["steps"] + told[0][f"{run}-resumed"]["steps"]
            ]
        assert_same_run(folder, run)


def test_a_sharded_run_goes_on_bit_for_bit(told: Told) -> None:
    for process in told:
        straight = process["sharded-broken"]["steps"]  # it goes well until the second stage
        resumed = [*process["sharded"]["steps"], *process["sharded-resumed"]["steps"]]
        assert straight[:3] == resumed[:3]


def test_a_run_begun_alone_goes_on_in_two_processes(told: Told, folder: Path) -> None:
    for run in ("alone-to-pair", "alone-to-sharded"):
        assert told[0][run]["error"] is None
        assert [step for step, _, _ in told[0][run]["steps"]] == [6, 7]
        assert_same_run(folder, run)


@pytest.mark.parametrize("run", ["pair-to-alone", "sharded-to-alone"])
def test_a_run_begun_by_two_processes_goes_on_alone(told: Told, folder: Path, run: str) -> None:
    runs.distil(folder, two_processes.exact_recipe(folder, 2), run)
    assert_same_run(folder, run)


def assert_same_run(folder: Path, run: str) -> None:
    """Losses of every step and trained weights are those of the single process, up to the order of fp32 sums.

    That order changes a loss by a few units in its last place (6e-8); Adam turns noise in a gradient that is almost
    zero into a step of the noise's sign, so single weights may differ by more than that, and whole tensors by little.
    """
    expected, found = (steps_of(folder / name) for name in ("alone", run))
    assert [row["step"] for row in found] == list(range(1, 8))
    for one, other in zip(expected, found, strict=True):
        assert one.pop("stage") == other.pop("stage")
        assert one.pop("layers", {}) == pytest.approx(other.pop("layers", {}), rel=1e-5)
        assert one == pytest.approx(other, rel=1e-5)
    files = [folder / name / "distill" / "adapter" / "adapter_model.safetensors" for name in ("alone", run)]
    weights = [load_file(file) for file in files]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        difference = (weights[1][name].double() - tensor.double()).norm()
        assert difference <= 1e-4 * tensor.double().norm(), name


def steps_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("mixers", "seconds", "tokens_per_s"):
            row.pop(name, None)
    return rows


# Sharing out.


def stages(*sizes: tuple[int, int]) -> Distill:
    return Distill(
        stages=tuple(
            Stage(f"s{number}", "distill", steps=1, batch_sequences=batch, accumulate=accumulate)
            for number, (batch, accumulate) in enumerate(sizes)
        )
    )


def sizes(distill: Distill) -> list[tuple[int, int]]:
    return [(stage.batch_sequences, stage.accumulate) for stage in distill.stages]


@pytest.mark.parametrize(
    ("begun_with", "count", "before", "after"),
    [
        (2, 2, (3, 1), (3, 1)),
        (4, 1, (8, 1), (8, 4)),  # never more memory a process
        (1, 4, (8, 1), (2, 1)),
        (1, 4, (2, 4), (2, 1)),
        (2, 3, (6, 1), (4, 1)),
        (3, 2, (4, 1), (3, 2)),
    ],
)
def test_another_number_of_processes_keeps_the_sequences_of_a_step(
    begun_with: int, count: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    fitted = fit_processes(stages(before), begun_with, count)
    assert sizes(fitted) == [after]
    assert count * after[0] * after[1] == begun_with * before[0] * before[1]


def test_a_number_of_processes_that_does_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match="began with 2 processes") as refused:
        fit_processes(stages((3, 2), (2, 4)), 2, 3)  # 12 and 16 sequences a step
    assert re.search(r": 1, 2, 4\.$", refused.value.hint)


# What accelerate may be asked for.


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"FSDP_VERSION": "1"}, "second version"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "offloaded"),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], what: str
) -> None:
    for name, value in (environment | {"ACCELERATE_USE_FSDP": "true"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=what):
        requested_sharding(SimpleNamespace(num_processes=2, state=None, device=torch.device("cpu")))


def test_sharding_follows_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(num_processes=2, state=None, device=torch.device("cpu"))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert requested_sharding(accelerator) is None
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert requested_sharding(accelerator) == Sharding("cpu", reshard_after_forward=True)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"  # every process reads the weights itself
    assert requested_sharding(SimpleNamespace(num_processes=1)) is None


# Lost ones.


def test_a_killed_process_ends_the_other_with_a_sentence(told: Told, folder: Path) -> None:
    lost = told[0]["lost"]
    assert lost["code"] == 75
    error = json.loads(lost["out"])["error"]
    assert (error["type"], error["exit_code"]) == ("ProcessLostError", 75)
    assert "A process of this run was lost" in error["message"]
    assert "the same command again" in error["hint"]
    assert not (folder / "lost" / "distill" / "adapter").exists()
    assert told[0]["timeout_s"] == TIMEOUT_S


def test_only_what_a_lost_process_causes_is_called_that() -> None:
    with pytest.raises(ProcessLostError, match="Connection closed by peer"), losses_told(2):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:37881")
    with pytest.raises(RuntimeError, match="shape") as other, losses_told(2):
        raise RuntimeError("shape mismatch")
    assert not isinstance(other.value, ProcessLostError)
    with pytest.raises(RuntimeError, match="gloo"), losses_told(1):
        raise RuntimeError("gloo")


def test_a_timeout_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("soon", "0", "-1", "inf"):
        monkeypatch.setenv(processes_module.TIMEOUT_VARIABLE, text)
        with pytest.raises(UsageError, match=re.escape(repr(text))):
            start_processes()


def test_what_the_first_process_refuses_ends_the_others_quietly(told: Told) -> None:
    assert told[0]["first only"] == [[True, ""], [True, "No."]]
    assert told[1]["first only"] == [[False, ""], [False, str(UsageError.exit_code)]]


def test_the_command_line_converts_and_speaks_in_the_first_process_alone(told: Told, folder: Path) -> None:
    first, second = (process["command line"] for process in told)
    assert (first["code"], second) == (0, {"code": 0, "out": "", "err": ""})
    assert json.loads(first["out"])["adapter"] == str(folder / "command" / "distill" / "adapter")
    assert runs.metric_steps(folder, "command") == [1, 2]
