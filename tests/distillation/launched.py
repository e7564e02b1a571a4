"""Commands that run as a user starts them: alone, by torchrun or by accelerate; watched, and never left behind.

Two processes use two GPUs and NCCL, or, where HYBRIDIZE_TEST_DEVICE is "cpu", the CPU and gloo.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = os.environ.get("HYBRIDIZE_TEST_DEVICE", "cuda") == "cpu"
NUM_DEVICES = 2 if ON_CPU else torch.cuda.device_count()
LIMIT_S = 150.0
"""Of a launch, with kernels to compile and others beside it."""
GONE_WITHIN_S = 10.0
TAIL_LINES = 40

MARK = "HYBRIDIZE_TEST_LAUNCH"
"""In the environment of everything that a launch starts: torchrun gives its workers sessions of their own."""
_LEFT_OUT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
_LEFT_OUT_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "HYBRIDIZE_PROCESS_TIMEOUT_S", "HYBRIDIZE_FAULT")
_SLOTS = BoundedSemaphore(max(1, min(8, (os.cpu_count() or 1) // 4)))
"""For launches side by side: each is up to three processes that keep a core busy for the seconds of their imports."""

Form = Literal["alone", "replicated", "sharded", "accelerate"]
"""One process; two with a copy of the models each; two with parts, as torchrun or as accelerate is asked for them."""


def command(form: Form) -> list[str]:
    """The words before `distill`."""
    python, count = sys.executable, ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    if form == "alone":
        return [python, "-m", "hybridize"]
    if form == "accelerate":
        asked = ["--use_fsdp", "--fsdp_version", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
        return [python, "-m", "accelerate.commands.launch", *asked, *count, "-m", "hybridize"]
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hybridize"]


def environment(form: Form, folder: Path, mark: str, gpu: int) -> dict[str, str]:
    """Of a launch, whatever launcher or configuration this process itself has.

    Args:
        folder: for accelerate's configuration, which is not the user's.
        gpu: that of a single process, 0 or 1.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIXES)
    }
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",") if name][:2]
    if form == "alone":
        visible = visible[gpu : gpu + 1]
    chosen = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "" if ON_CPU else ",".join(visible),
        "NVIDIA_TF32_OVERRIDE": "0",
        "HYBRIDIZE_PROCESS_TIMEOUT_S": str(LIMIT_S / 2),
        MARK: mark,
    }
    if ON_CPU:
        chosen["ACCELERATE_USE_CPU"] = "1"
    if form == "sharded":
        chosen |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return kept | chosen


@dataclass(frozen=True)
class Ended:
    """How a launch ended.

    Attributes:
        line: what was started. code: of the launcher. wall_s: how long it took.
    """

    line: str
    code: int
    out: str
    err: str
    wall_s: float

    def expect(self, *codes: int) -> Ended:
        """Itself, if it ended with one of the codes."""
        assert self.code in codes, f"exit code {self.code}, not {' or '.join(map(str, codes))}\n{self}"
        return self

    def says(self, pattern: str) -> bool:
        """Whether a line of standard error holds a text."""
        return any(pattern in line for line in self.err.splitlines())

    def __str__(self) -> str:
        tail = "\n".join(self.err.splitlines()[-TAIL_LINES:])
        return f"$ {self.line}\n[exit code {self.code} after {self.wall_s:.0f} s]\n{self.out[-500:]}\n{tail}"


class Launch:
    """A command that runs.

    Args:
        form: how it is started.
        arguments: of `hybridize`.
        logs: folder for what it says.
        gpu: that of a single process, 0 or 1.
    """

    def __init__(self, form: Form, arguments: Sequence[object], logs: Path, gpu: int = 0) -> None:
        self.form = form
        self.mark = uuid.uuid4().hex
        self.line = " ".join(map(str, ["hybridize", f"[{form}]", *arguments]))
        self._paths = [logs / f"{self.mark}.{name}" for name in ("out", "err")]
        self._start = time.monotonic()
        with self._paths[0].open("w") as out, self._paths[1].open("w") as err:
            self._process = subprocess.Popen(
                [*command(form), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(form, logs, self.mark, gpu),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the launcher, or of the process that is alone."""
        return self._process.pid

    def worker(self, rank: int) -> int:
        """Process id of a rank, once it is there."""

        def found() -> int | None:
            pids = [pid for pid, variables in self._marked() if variables.get("RANK") == str(rank)]
            return min(pids, default=None)  # not one that it started itself

        return self._until(found, f"rank {rank} did not come")

    def wait_for_step(self, metrics: Path, step: int) -> int:
        """Until a step is in metrics.jsonl; returns the last step there."""

        def found() -> int | None:
            last = last_step(metrics)
            return last if last >= step else None

        return self._until(found, f"step {step} did not come")

    def send(self, number: signal.Signals, pid: int | None = None) -> None:
        """A signal to the launcher, or to another process of it."""
        assert self._process.poll() is None, f"ended before {number.name} could be sent\n{self.ended()}"
        os.kill(self.pid if pid is None else pid, number)

    def wait(self, limit_s: float | None = None) -> Ended:
        """How it ends, within so many seconds from now; None: within its own limit.

        A longer one fails, and nothing of it is left.
        """
        left_s = max(self._start + LIMIT_S - time.monotonic(), 0) if limit_s is None else limit_s
        try:
            self._process.wait(timeout=left_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end within {left_s:.0f} s more\n{self.ended()}") from None
        return self.ended()

    def ended(self) -> Ended:
        """What it has said so far, and its exit code if it has one."""
        out, err = (path.read_text(errors="replace") for path in self._paths)
        code = self._process.poll()
        return Ended(self.line, -999 if code is None else code, out, err, time.monotonic() - self._start)

    def left(self) -> list[int]:
        """Processes of it that are still there some time after its end."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (found := [pid for pid, _ in self._marked()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def kill(self) -> None:
        """Ends everything that it started."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        for pid, _ in self._marked():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _marked(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Process ids and environments of what it started; of a process that has ended the environment is empty."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # another user's, or gone by now
                words = path.read_bytes().decode(errors="replace").split("\0")
                variables = dict(word.split("=", 1) for word in words if "=" in word)
                if variables.get(MARK) == self.mark:
                    yield int(path.parent.name), variables

    def _until(self, found: Callable[[], int | None], otherwise: str) -> int:
        """What is found in the end, while it runs and has time left."""
        while (value := found()) is None:
            assert self._process.poll() is None, f"{otherwise}: it ended\n{self.ended()}"
            if time.monotonic() > self._start + LIMIT_S:
                self.kill()
                raise AssertionError(f"{otherwise} within {LIMIT_S:.0f} s\n{self.ended()}")
            time.sleep(0.005)
        return value


def last_step(metrics: Path) -> int:
    """The last step that is whole in a metrics.jsonl; 0 without one."""
    try:
        lines = metrics.read_text().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError):
            return int(json.loads(line)["step"])
    return 0


class Runs:
    """The launches that the tests are about, by name: each is made once, when it is first asked for.

    Args:
        folder: with teacher, texts and recipes.
        table: by name a function and its arguments, behind these runs and the name.
    """

    def __init__(self, folder: Path, table: Mapping[str, tuple[Any, ...]]) -> None:
        self.folder, self.table = folder, table
        (folder / "logs").mkdir()
        self._made: dict[str, Future[Any]] = {}
        self._lock = Lock()
        self._live: list[Launch] = []
        self._closed = False
        self._pool = ThreadPoolExecutor(len(table))

    def __getitem__(self, name: str) -> Any:
        """What a launch, or several in a row, came to; waits for it. Raises what went wrong in it."""
        return self.start(name).result()

    def start(self, name: str) -> Future[Any]:
        with self._lock:
            if name not in self._made:
                work, *arguments = self.table[name]
                self._made[name] = self._pool.submit(work, self, name, *arguments)
            return self._made[name]

    def close(self) -> None:
        """Ends what still runs."""
        self._closed = True
        for running in list(self._live):
            running.kill()
        self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def begin(self, form: Form, *arguments: object, gpu: int = 0) -> Iterator[Launch]:
        """A launch as soon as there are cores for it; nothing of it is left after the block."""
        with _SLOTS:
            assert not self._closed, "the tests have ended"
            launched = Launch(form, arguments, self.folder / "logs", gpu)
            self._live.append(launched)
            try:
                yield launched
            finally:
                launched.kill()
                self._live.remove(launched)

    def distil(self, form: Form, run: str, *changes: str, recipe: str, gpu: int = 0) -> Ended:
        """A run, from where it is to its end."""
        with self.begin(form, *self.arguments(run, recipe, *changes), gpu=gpu) as launched:
            return launched.wait().expect(0)

    def stop(self, form: Form, run: str, *changes: str, recipe: str, from_step: int, everyone: bool = False) -> Ended:
        """A run that SIGTERM ends after a step, sent to the launcher, or to its two processes and then to it."""
        with self.begin(form, *self.arguments(run, recipe, *changes)) as launched:
            pids = [launched.worker(0), launched.worker(1)] if everyone else []
            begun_at = last_step(self.metrics(run))
            launched.wait_for_step(self.metrics(run), max(begun_at + 1, from_step))
            for pid in (*pids, launched.pid):
                launched.send(signal.SIGTERM, pid)
            ended = launched.wait()
            assert launched.left() == [], f"processes are left\n{ended}"
        assert ended.code != 0, f"it ended well, before the signal was heard\n{ended}"
        return ended

    def arguments(self, run: str, recipe: str, *changes: str) -> list[object]:
        return ["--offline", "distill", self.folder / f"{recipe}.yaml", "--out", self.folder / run, *changes]

    def metrics(self, run: str) -> Path:
        return self.folder / run / "distill" / "metrics.jsonl"

    def copy(self, run: str, to: str) -> str:
        shutil.copytree(self.folder / run, self.folder / to)
        return to
