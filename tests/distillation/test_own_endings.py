"""How one of several processes ends by itself: told by whom, watched from when, and by which branch with the others."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridize.cli import endings, several
from hybridize.cli.app import Settings
from hybridize.distillation import failure, lifeline, signals
from hybridize.distillation.gradients import Norms
from hybridize.distillation.lifeline import Lifeline
from hybridize.distillation.log import StepNote
from hybridize.distillation.sharding import Sharding
from hybridize.distillation.signals import stop_requests
from hybridize.errors import CheckpointError, NumbersError, ProcessLostError, ResourceError, StoppedError
from hybridize.recipe.schema import Stage


@pytest.fixture
def lines() -> Iterator[tuple[Lifeline, Lifeline]]:
    """Those of the first process and of another."""
    near, far = socket.socketpair()
    pair = Lifeline({1: near}), Lifeline({0: far})
    yield pair
    for line in pair:
        line.close()


def wait_until_lost(line: Lifeline) -> None:
    deadline = time.monotonic() + 10
    while line.lost is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert line.lost is not None


def test_a_loss_just_after_the_look_is_watched(
    lines: tuple[Lifeline, Lifeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(lifeline.os, "_exit", codes.append)
    monkeypatch.setattr(lifeline, "GRACE_S", 0.1)
    first, other = lines
    look = Lifeline.check

    def look_and_lose(self: Lifeline, within_s: float = 0.0) -> None:
        look(self, within_s)
        other.close()
        wait_until_lost(self)

    monkeypatch.setattr(Lifeline, "check", look_and_lose)
    with first.bound():
        time.sleep(1)
    assert codes == [75]


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [(ResourceError("The disk is full."), True), (NumbersError("NaN."), False), (CheckpointError("Damaged."), False)],
)
def test_an_error_that_one_alone_meets_is_a_loss_for_the_others(
    lines: tuple[Lifeline, Lifeline], error: Exception, is_lost: bool
) -> None:
    first, other = lines
    with pytest.raises(type(error)), other.bound():
        raise error
    if is_lost:
        wait_until_lost(first)
        with pytest.raises(ProcessLostError):
            first.check()
    else:
        time.sleep(0.1)
        first.check()


# Who tells it.


@pytest.fixture
def second_process(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The command line in the second of two processes, where leaving raises SystemExit."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(several, "_left_to_first", [])
    monkeypatch.setattr(several, "_launcher_came", threading.Event())
    monkeypatch.setattr(several, "TELLS_WITHIN_S", 0.2)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    settings = Settings()
    settings.output.process = 1
    return settings


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in (*signals.SIGNALS, signal.SIGALRM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def test_a_signal_while_it_tells_is_not_forgotten(second_process: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "TELLS_WITHIN_S", 60)
    endings.show_ending(CheckpointError("Not there."), second_process)
    with several.undisturbed_by_launcher():
        signal.raise_signal(signal.SIGTERM)
    begun = time.monotonic()
    with pytest.raises(SystemExit):
        several.leave(4)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("first_ends", [True, False])
def test_what_the_first_process_does_not_tell_another_one_does(
    second_process: Settings, capsys: pytest.CaptureFixture[str], first_ends: bool
) -> None:
    error = CheckpointError("The teacher is not there.", where="/models/teacher")
    assert endings.show_ending(error, second_process) == 4
    if first_ends:  # the launcher's signal
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        several.leave(4)
    assert left.value.code == 4
    said = capsys.readouterr().err
    assert said == "" if first_ends else "error in process 1: /models/teacher: The teacher is not there." in said


def test_a_stop_is_left_to_the_first_process(
    second_process: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "TELLS_WITHIN_S", 60)
    assert endings.show_ending(StoppedError("The state is saved."), second_process) == 75
    begun = time.monotonic()
    with pytest.raises(SystemExit):
        several.leave(75)
    assert time.monotonic() - begun < 30
    assert capsys.readouterr().err == ""


def test_a_process_that_has_saved_is_not_ended_by_a_late_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_WISH_S", 0.0)
    with stop_requests(launched=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop
        stop.met = True
        signal.raise_signal(signal.SIGTERM)  # would end this process
        signal.raise_signal(signal.SIGINT)


# A loss that is not finite.


@pytest.mark.parametrize(
    ("bad", "sharding", "passes"),
    [
        ("loss", Sharding("cpu"), [1, 1]),
        ("loss", None, [1, 0]),
        ("layer_2", Sharding("cpu"), [0, 0]),  # align: it is known which
        ("layer_2", None, [0, 0]),
    ],
)
def test_sharded_processes_look_for_the_layer_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, sharding: Sharding | None, passes: list[int]
) -> None:
    """Passes forward of the process whose loss it is, and of another: a sharded one needs all."""
    counted: list[int] = []
    monkeypatch.setattr(failure, "first_bad_layer", lambda *_: counted.append(1))
    note = StepNote(Stage("s", "align", steps=1), 1, 1, 8, (), {}, Norms(torch.ones(()), (), torch.ones(0)), {}, True)
    student: Any = SimpleNamespace(model=None)
    processes: Any = SimpleNamespace(sharding=sharding, index=0, undisturbed=nullcontext)
    found = []
    for own_loss in (True, False):
        counted.clear()
        numbers = {"loss": float("nan"), bad: float("nan"), "grad_norm": 1.0}
        with pytest.raises(NumbersError):
            failure.fail(tmp_path, note, numbers, student, processes, nullcontext(), own_loss=own_loss)
        found.append(len(counted))
    assert found == passes
