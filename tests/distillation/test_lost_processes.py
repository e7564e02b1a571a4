"""The loss of one process ends the others: soon, with a sentence, even where Python cannot raise in the main thread."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch

from hybridize.cli import endings
from hybridize.cli.app import Settings
from hybridize.distillation import lifeline, meeting, signals
from hybridize.distillation.lifeline import Lifeline
from hybridize.distillation.meeting import connect
from hybridize.distillation.processes import Processes, losses_told
from hybridize.distillation.signals import stop_requests
from hybridize.errors import InterruptedError_, ProcessLostError, StoppedError, UsageError
from tests.distillation import lost_process, runs

ROOT = runs.ROOT
Group = Callable[[int], list[Lifeline]]


@pytest.fixture
def group() -> Iterator[Group]:
    """Makes the lines of some processes, all of them in this one."""
    with ExitStack() as stack:

        def make(count: int) -> list[Lifeline]:
            pairs = {number: socket.socketpair() for number in range(1, count)}
            first = Lifeline({number: one for number, (one, _) in pairs.items()})
            lines = [first, *(Lifeline({0: other}) for _, other in pairs.values())]
            for line in lines:
                stack.callback(line.close)
            return lines

        yield make


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which threads would have ended this process; the grace is short."""
    codes: list[int] = []
    monkeypatch.setattr(lifeline.os, "_exit", codes.append)
    monkeypatch.setattr(lifeline, "GRACE_S", 0.1)
    return codes


def soon(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


# What the processes hear of each other.


@pytest.mark.parametrize(("count", "lost"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_all_others_hear_who_was_lost(group: Group, count: int, lost: int) -> None:
    lines = group(count)
    lines[lost].close()
    for line in lines[:lost] + lines[lost + 1 :]:
        assert soon(lambda line=line: line.lost is not None)
        with pytest.raises(ProcessLostError, match=f"was lost: number {lost}, counted from 0"):
            line.check()
        with pytest.raises(ProcessLostError), line.bound():
            pytest.fail("the block was begun")


def test_the_others_wait_for_the_first_and_hear_its_code(group: Group) -> None:
    first, *others = group(3)
    threading.Timer(0.1, lambda: (first.done(), first.done(3), first.close())).start()
    for other in others:
        assert [other.wait_for_first(), other.wait_for_first()] == [0, 3]  # what was said before the end counts
        with pytest.raises(ProcessLostError, match="number 0"):
            other.wait_for_first()


def test_messages_may_come_in_pieces(group: Group) -> None:
    near, far = socket.socketpair()
    line = Lifeline({0: near})
    for byte in lifeline._MESSAGE.pack(b"d", 4) + lifeline._MESSAGE.pack(b"l", 2):
        far.sendall(bytes([byte]))
        time.sleep(0.01)
    assert line.wait_for_first() == 4
    assert soon(lambda: line.lost == 2)
    line.close()
    far.close()


# The end of a process that cannot end itself.


def test_a_process_that_goes_on_needing_a_lost_one_is_ended(
    group: Group, ended: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = group(2)
    with caplog.at_level(logging.CRITICAL), first.bound():
        second.close()
        assert soon(lambda: ended)
    assert ended == [75]
    assert "A process of this run was lost: number 1" in caplog.text  # who uses the library hears it too
    assert "same command again" in caplog.text


def test_telling_may_take_for_ever(group: Group, ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "TELL_S", 0.1)
    never = threading.Event()
    first, second = group(2)
    first.tell = lambda error: never.wait()
    with first.bound():
        second.close()
        assert soon(lambda: ended)
        assert ended == [75]
        never.set()
        assert soon(lambda: len(ended) == 2)


@pytest.mark.parametrize("where", ["not needed", "left before", "undisturbed"])
def test_a_process_that_does_not_need_the_lost_one_is_left_alone(group: Group, ended: list[int], where: str) -> None:
    first, second = group(2)
    if where == "undisturbed":
        with first.bound(), first.undisturbed():
            second.close()
            time.sleep(3 * lifeline.GRACE_S)
            assert first.lost == 1
    else:
        if where == "left before":
            first.close()
        second.close()
        time.sleep(3 * lifeline.GRACE_S)
    assert ended == []


def test_an_own_error_matters_more_if_it_comes_in_time(group: Group, ended: list[int]) -> None:
    first, second = group(2)

    def end_by_itself() -> None:
        with first.bound():
            second.close()
            assert soon(lambda: first.lost == 1)
            raise StoppedError("The state is saved.")

    with pytest.raises(StoppedError, match="saved"):
        end_by_itself()
    time.sleep(3 * lifeline.GRACE_S)
    assert ended == []


def test_an_error_of_nobody_else_ends_the_lines_before_the_process(group: Group) -> None:
    first, second = group(2)
    with pytest.raises(MemoryError), second.bound():
        raise MemoryError
    assert soon(lambda: first.lost == 1)  # while the second may wait in CUDA for the first


def test_an_error_that_all_meet_leaves_the_lines(group: Group) -> None:
    first, second = group(2)
    with pytest.raises(UsageError), second.bound():
        raise UsageError("No.")
    time.sleep(0.1)
    assert first.lost is None
    with first.bound(), second.bound():
        first.check()


# What a run makes of it.


def processes_of(line: Lifeline, index: int) -> Processes:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=2, process_index=index, is_main_process=index == 0, state=None
    )
    return Processes(accelerator, line)


def test_no_message_is_begun_that_can_never_end(group: Group) -> None:
    first, second = group(2)
    processes = processes_of(first, 0)
    second.close()
    assert soon(lambda: first.lost == 1)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    for ask in (
        processes.wait,
        lambda: processes.sum(torch.ones(())),
        lambda: processes.any(True),
        lambda: processes.average_gradients([parameter]),
        processes.gather_random_states,
        lambda: processes.first_only(lambda: pytest.fail("it was begun")),
    ):
        with pytest.raises(ProcessLostError):
            ask()


def test_a_message_that_fails_is_told_with_the_name_of_the_lost(group: Group) -> None:
    first, second = group(2)
    threading.Timer(0.1, second.close).start()
    with pytest.raises(ProcessLostError, match="number 1"), losses_told(2, first):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")


def test_the_launchers_signal_after_a_loss_is_told_as_the_loss(group: Group) -> None:
    first, second = group(2)

    def work() -> None:
        second.close()
        assert soon(lambda: first.lost == 1)
        raise KeyboardInterrupt

    with pytest.raises(ProcessLostError, match="number 1"):
        processes_of(first, 0).first_only(work)


def test_what_interrupts_the_first_ends_the_others_quietly(group: Group) -> None:
    first, second = group(2)

    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes_of(first, 0).first_only(work)
    with pytest.raises(SystemExit) as left:
        processes_of(second, 1).first_only(work)
    assert left.value.code == InterruptedError_.exit_code


def test_the_others_come_after_the_first_and_meet_what_it_met(group: Group) -> None:
    first, second = group(2)
    met = []

    def come_second() -> None:
        with processes_of(second, 1).first_before_others():
            met.append(1)

    def come_first() -> None:
        with processes_of(first, 0).first_before_others():
            other.start()
            time.sleep(0.1)
            met.append(0)
            raise UsageError("No.")

    other = threading.Thread(target=come_second)
    with pytest.raises(UsageError):
        come_first()
    other.join(10)
    assert met == [0, 1]


# How they find each other.


def test_strangers_are_not_taken_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_GREET_S", 0.2)
    for local in ("3", "1"):  # all on one machine, and not
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        told: list[int] = []
        strangers: list[socket.socket] = []
        found: dict[int, dict[int, socket.socket]] = {}

        def from_first(numbers: list[int], told: list[int] = told, strangers: list[socket.socket] = strangers) -> Any:
            if any(numbers):
                for greeting in (b"GET /", meeting._GREETING.pack(numbers[1] ^ 1, 1), b""):
                    strangers.append(socket.create_connection(("127.0.0.1", numbers[0])))
                    strangers[-1].sendall(greeting)
                told += numbers
            assert soon(lambda: told)
            return told

        def meet(index: int, found: dict[int, Any] = found, from_first: Any = from_first) -> None:
            found[index] = connect(index, 3, from_first, 10.0)

        threads = [threading.Thread(target=meet, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert {index: set(lines) for index, lines in found.items()} == {0: {1, 2}, 1: {0}, 2: {0}}
        for index in (1, 2):
            found[index][0].sendall(b"%d" % index)
            assert found[0][index].recv(1) == b"%d" % index
        for each in (*strangers, *(line for lines in found.values() for line in lines.values())):
            each.close()


def test_one_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ProcessLostError, match="do not reach each other"):
        connect(0, 2, lambda numbers: numbers, 0.1)


def test_a_child_does_not_hide_the_loss_of_its_parent() -> None:
    code = (
        "import os, signal, sys, time, socket\n"
        "from hybridize.distillation.lifeline import Lifeline\n"
        "line = Lifeline({0: socket.socket(fileno=int(sys.argv[1]))})\n"
        "if os.fork() == 0:\n"
        "    time.sleep(20)\n"
        "    os._exit(0)\n"
        "time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    near, far = socket.socketpair()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(far.fileno())], cwd=ROOT, pass_fds=[far.fileno()], start_new_session=True
    )
    far.close()
    line = Lifeline({1: near})
    try:
        assert soon(lambda: line.lost == 1)
        assert child.wait(10) == -signal.SIGKILL
    finally:
        os.killpg(child.pid, signal.SIGKILL)


# Signals, and the command line's end.


def test_a_launcher_and_a_batch_system_may_both_pass_on_one_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    with stop_requests(launched=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGTERM"
        ends = []
        monkeypatch.setattr(signals, "SAME_WISH_S", 0.0)
        monkeypatch.setattr(signals.signal, "raise_signal", ends.append)
        os.kill(os.getpid(), signal.SIGTERM)
        assert soon(lambda: ends)
        assert ends == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # so it would have ended here


def test_an_ending_that_the_launcher_interrupts_is_still_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    def interrupted_while_ending() -> int:
        try:
            raise StoppedError("The state is saved.")
        finally:
            raise KeyboardInterrupt

    with pytest.raises(click.Abort) as caught:
        click.Command("one", callback=interrupted_while_ending).main([], standalone_mode=False)
    error = caught.value
    assert endings.show_ending(error, Settings()) == 75
    assert "The state is saved." in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert endings.show_ending(error, Settings()) == 130


def test_torchrun_ends_when_a_process_is_killed(tmp_path: Path) -> None:
    """The other one's main thread is blocked for good; its lifeline ends it."""
    from tests.cli.conftest import RECIPE

    runs.write_teacher(tmp_path)
    runs.write_texts(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path), encoding="utf-8")
    program = Path(lost_process.__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["--json", "--offline", "distill", str(recipe), "--out", str(tmp_path / "run")]
    ended = subprocess.run([*torchrun, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    error = json.loads(ended.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("ProcessLostError", 75)
    assert error["message"] == "A process of this run was lost: number 1, counted from 0."
    codes = dict(re.findall(r"rank +: (\d) .*\n +exitcode +: (-?\d+) ", ended.stderr))
    assert codes == {"0": "75", "1": "-9"}
    for pid in re.findall(r"\(pid: (\d+)\)", ended.stderr):
        with suppress(ProcessLookupError):
            os.kill(int(pid), 0)
            pytest.fail(f"process {pid} is still there")
