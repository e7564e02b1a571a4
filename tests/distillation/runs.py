"""A tiny run from end to end: a teacher with a byte-like tokenizer on disk, converted, ready to distil.

As a script it serves runs that tests can kill: it imports everything once, then forks a child for each line of its
standard input and answers with the child's process id and, once it has ended, its exit status.
"""

from __future__ import annotations

import json
import os
import random
import signal
import string
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridize.recipe.schema import Curriculum, Data, Distill, LayerPlan, Lora, Loss, MixerChoice, Ramp, Recipe, Stage
from hybridize.recipe.sources import TextSource

ROOT = Path(__file__).resolve().parents[2]
READY = "ready\n"
"""What the process that serves runs says first."""
TIMES = ("seconds", "tokens_per_s", "peak_memory_bytes")

CHARACTERS = string.ascii_letters + string.digits + " .,\n'-"
MIXERS = {
    "T": MixerChoice(
        "token_eviction", {"window_tokens": 14, "sink_tokens": 2, "budget_tokens": 8, "l1_every_steps": 2}
    ),
    "G": MixerChoice("gated_delta_net"),
}
STAGES = (
    Stage("align", "align", steps=3, batch_sequences=1, accumulate=2, learning_rate=1e-2, passes=2, warmup_steps=1),
    Stage(
        "distill",
        "distill",
        steps=4,
        batch_sequences=2,
        accumulate=2,
        learning_rate=1e-2,
        projection_learning_rate=2e-3,
        budget_ramp=Ramp(0.0, 0.5),
        loss=Loss(hidden=0.1, cross_entropy=0.1),
    ),
)
"""Passes, accumulation, a ramp, dropout in the scorer: everything that a resumed run has to find again."""


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    """The recipe of the tests; `changes` are fields of `Distill`."""
    distill = Distill(stages=STAGES, lora=Lora(rank=2, alpha=4), precision="float32", save_every_steps=1)
    return Recipe(
        model=str(folder / "teacher"),
        layers=LayerPlan(pattern="F T G T"),
        mixers=MIXERS,
        data=Data(
            train=(TextSource("text/*.txt"),),
            held_out=(TextSource("held/*.txt"),),
            sequence_tokens=32,
            shuffle_documents=4,
        ),
        distill=replace(distill, **changes),
    )


def packed_recipe(folder: Path, **changes: Any) -> Recipe:
    """The same over many short documents that are packed, in sequences that grow from 16 to 32 tokens."""
    align, distill = STAGES
    stages = (align, replace(distill, batch_sequences=1, curriculum=Curriculum(start_tokens=16, end=0.5)))
    recipe = tiny_recipe(folder, **{"stages": stages, **changes})
    return replace(recipe, data=replace(recipe.data, train=(TextSource("short/*.jsonl"),)))


RECIPES = {"tiny": tiny_recipe, "packed": packed_recipe}


def write_teacher(folder: Path, **changes: Any) -> None:
    """A tiny Llama and its tokenizer as a checkpoint in `folder/teacher`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import tiny_teacher

    vocabulary = {token: index for index, token in enumerate(("<pad>", "<s>", "</s>", "<unk>", *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tiny_teacher(**changes).save_pretrained(folder / "teacher")
    fast.save_pretrained(folder / "teacher")


def write_texts(folder: Path) -> None:
    """Six training documents, 60 short ones as JSON lines, and a held-out one."""
    for name in ("text", "short", "held"):
        (folder / name).mkdir()
    words = random.Random(0)
    lines = [{"text": f"{number} " + "and so " * words.randrange(4)} for number in range(60)]
    (folder / "short" / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(6):
        (folder / "text" / f"{number}.txt").write_text(f"This is document {number}. " * (3 + number))
    (folder / "held" / "x.txt").write_text("Never seen in training. " * 4)


def prepare(folder: Path, recipe: Recipe | None = None) -> Recipe:
    """Writes teacher, texts and `folder/run/converted`; returns the recipe."""
    from hybridize.model.convert import convert
    from hybridize.plan import plan

    if not (folder / "teacher").exists():
        write_teacher(folder)
        write_texts(folder)
    recipe = tiny_recipe(folder) if recipe is None else recipe
    convert(plan(recipe, offline=True), folder / "run" / "converted")
    return recipe


def distil(folder: Path, recipe: Recipe, run: str = "run") -> Path:
    """Distils `folder/run`; the adapter's folder."""
    from hybridize.distillation.run import distill
    from hybridize.plan import plan

    return distill(recipe, folder / run, plan=plan(recipe, offline=True), base=folder, offline=True)


def again(run: Path, recipe: str = "tiny", **changes: Any) -> Path:
    """Distils the folder `run`, or goes on with it, in this process; the folder of what was trained."""
    return distil(run.parent, RECIPES[recipe](run.parent, **changes), run.name).parent


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times in them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same(found: Path, reference: Path) -> None:
    """Two folders hold the same adapter, bit for bit, and the same 7 lines of metrics."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "manifest.json"):
        assert (found / "adapter" / name).read_bytes() == (reference / "adapter" / name).read_bytes(), name
    assert rows(found) == rows(reference)
    assert [row["step"] for row in rows(found)] == list(range(1, 8))


def metric_steps(folder: Path, run: str = "run") -> list[int]:
    lines = (folder / run / "distill" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


class Server:
    """Runs the distillation in processes of its own, which may be killed.

    Args:
        folder: with teacher and texts.
        process: that of `serve`, which others may use as well.
    """

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder = folder
        self._process = process

    def __call__(self, run: Path, fault: str = "", recipe: str = "tiny", **changes: Any) -> int:
        """The exit status of a run with a fault; negative: the signal that ended it."""
        self._ask(run, fault, recipe, changes)
        return int(self._answer())

    def signalled(self, run: Path, number: signal.Signals, after_s: float, recipe: str = "tiny", **changes: Any) -> int:
        """The same for a run that gets a signal after so many seconds, if it has not ended by then."""
        process = self._ask(run, "", recipe, changes)
        time.sleep(after_s)
        with suppress(ProcessLookupError):
            os.kill(process, number)
        return int(self._answer())

    def command(self, arguments: list[str], fault: str) -> int:
        """The exit status of `hybridize ARGUMENTS...` with a fault."""
        self._send({"arguments": arguments, "fault": fault})
        return int(self._answer())

    def _ask(self, run: Path, fault: str, recipe: str, changes: dict[str, Any]) -> int:
        return self._send(
            {"folder": str(self.folder), "run": run.name, "fault": fault, "recipe": recipe, "changes": changes}
        )

    def _send(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def serving(log: Path) -> Iterator[subprocess.Popen[str]]:
    """The process of `serve` while the block runs; what its runs say goes to the log."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == READY, log.read_text()  # so that the first run takes its own time alone
            yield process
        finally:
            process.communicate(timeout=30)


def child(fault: str, arguments: list[str] | None = None, **request: Any) -> int:
    """Runs a command or distils, with a fault; the exit status that the command line gives."""
    if fault:
        os.environ["HYBRIDIZE_FAULT"] = fault
    if arguments is None:
        return distil_status(**request)
    from hybridize.cli.main import run as command_line

    return command_line(arguments)


def distil_status(folder: str, run: str, recipe: str, changes: dict[str, Any]) -> int:
    """Distils; the exit status that the command line would give."""
    from hybridize.errors import HybridizeError

    try:
        distil(Path(folder), RECIPES[recipe](Path(folder), **changes), run)
    except HybridizeError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


def serve() -> None:
    """Says that it is ready; then `{"folder", "run", "fault", "recipe", "changes"}` or `{"arguments", "fault"}` a line
    -> process id and exit status, a line each.

    A negative status is the signal that ended the child.
    """
    import hybridize.distillation.run  # noqa: F401 - paid for once, before the forks

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))  # so is what libraries do for the first model that they load
    sys.stdout.write(READY)
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = child(**request)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
