"""One of two processes that distil together; tells what it saw as one JSON object.

Called as `two_processes.py FOLDER`, with the runs prepared that are named here. In the end the second kills itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import distributed

from hybridize.cli.main import run
from hybridize.distillation.data import Batch
from hybridize.distillation.processes import start_processes
from hybridize.distillation.sharding import gather, is_sharded
from hybridize.distillation.teacher import Teacher
from hybridize.distillation.trainer import Trainer
from hybridize.errors import HybridizeError, UsageError
from hybridize.recipe.schema import Loss, MixerChoice, Recipe
from tests.distillation import runs

RUNS = ("straight", "stopped", "broken")
"""Of the usual recipe."""
EXACT_RUNS = ("pair", "sharded", "sharded-broken")
"""Of `exact_recipe`, with those that the first process begins alone: "alone-to-pair" and "alone-to-sharded"."""
STOP_STEP = 5
"""In the second stage, between two steps of it."""


def exact_recipe(folder: Path, processes: int) -> Recipe:
    """One whose steps have the same sequences and the same mathematics in one process and in two: no dropout.

    Args:
        processes: that it is for; each has its share of a micro-batch of two and of four.
    """
    recipe = runs.tiny_recipe(folder, save_every_steps=100, log_every_steps=1, gradient_checkpointing=True)
    assert recipe.distill is not None
    assert recipe.data is not None
    align, distil = recipe.distill.stages
    align = replace(align, batch_sequences=2 // processes)
    distil = replace(distil, batch_sequences=4 // processes, loss=Loss(hidden=0.1, cross_entropy=0.1))
    eviction = MixerChoice("token_eviction", {**recipe.mixers["T"].options, "scorer_dropout": 0.0})
    return replace(
        recipe,
        mixers={**recipe.mixers, "T": eviction},
        data=replace(recipe.data, document_boundaries=False),
        distill=replace(recipe.distill, stages=(align, distil)),
    )


def digest(tensors: Iterable[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


class Witness:
    """Distils, and notes each step's random state and weights.

    Attributes:
        signals: a signal that the second process sends itself, by the step at whose beginning.
        breaks: the teacher's hidden states are not finite in the second process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.second = os.environ["RANK"] == "1"
        self.seen: list[list[Any]] = []
        self.num_sharded = 0
        self.signals: dict[int, signal.Signals] = {}
        self.breaks = False
        self.step, self.last_hidden = Trainer._step, Teacher.last_hidden
        witness = self

        def watched(trainer: Trainer, *args: Any) -> Any:
            number = trainer.progress.step + 1
            if witness.second and number in witness.signals:
                os.kill(os.getpid(), witness.signals[number])
            measured = witness.step(trainer, *args)
            trained = trainer.student.trained()
            witness.num_sharded = sum(map(is_sharded, trained.values()))
            weights = gather(trained, keep=True)
            witness.seen.append([number, digest([torch.get_rng_state()]), digest(weights.values())])
            return measured

        def broken(teacher: Teacher, batch: Batch) -> torch.Tensor:
            hidden = witness.last_hidden(teacher, batch)
            return hidden * float("inf") if witness.breaks and witness.second else hidden

        Trainer._step = watched  # type: ignore[method-assign]
        Teacher.last_hidden = broken  # type: ignore[method-assign]

    def distil(
        self, run: str, recipe: Recipe, *, sharded: bool = False, signals: dict[int, signal.Signals] | None = None
    ) -> dict[str, Any]:
        os.environ["ACCELERATE_USE_FSDP"] = str(sharded)
        self.seen.clear()
        self.signals = signals or {}
        error: HybridizeError | None = None
        try:
            runs.distil(self.folder, recipe, run)
        except HybridizeError as raised:
            error = raised
        what, code = ("", 0) if error is None else (error.what, error.exit_code)
        seen = {"steps": list(self.seen), "sharded": self.num_sharded}
        return seen | {"error": None if error is None else type(error).__name__, "what": what, "exit_code": code}

    def command(self, out: Path, *, signals: dict[int, signal.Signals] | None = None) -> dict[str, Any]:
        """Exit code and what is printed by `hybridize distill`."""
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        self.signals = signals or {}
        told, noise = io.StringIO(), io.StringIO()
        with redirect_stdout(told), redirect_stderr(noise):
            code = run(["--json", "--offline", "distill", str(self.folder / "recipe.yaml"), "--out", str(out)])
        return {"code": code, "out": told.getvalue(), "err": noise.getvalue()}

    def copy(self, run: str, to: str) -> None:
        if not self.second:
            shutil.copytree(self.folder / run, self.folder / to)


def refused_by_first(reason: HybridizeError | None) -> list[Any]:
    """What the first process does alone and may refuse: whether this one did it, and how it ended."""
    worked: list[bool] = []

    def work() -> None:
        worked.append(True)
        if reason is not None:
            raise reason

    try:
        start_processes().first_only(work)
    except (HybridizeError, SystemExit) as error:
        return [bool(worked), str(error)]
    return [bool(worked), ""]


def main(folder: Path) -> None:
    witness = Witness(folder)
    usual, exact = runs.tiny_recipe(folder, save_every_steps=100), exact_recipe(folder, 2)
    begun_alone = exact_recipe(folder, 1)
    told: dict[str, Any] = {}
    told["straight"] = witness.distil("straight", usual)
    told["stopped"] = witness.distil("stopped", usual, signals={3: signal.SIGTERM})
    told["resumed"] = witness.distil("stopped", usual)

    told["pair"] = witness.distil("pair", exact, signals={STOP_STEP: signal.SIGTERM})
    witness.copy("pair", "pair-to-alone")
    told["pair-resumed"] = witness.distil("pair", exact)
    told["sharded"] = witness.distil("sharded", exact, sharded=True, signals={2: signal.SIGTERM})
    witness.copy("sharded", "sharded-to-alone")
    told["sharded-resumed"] = witness.distil("sharded", exact, sharded=True)
    told["alone-to-pair"] = witness.distil("alone-to-pair", begun_alone)
    told["alone-to-sharded"] = witness.distil("alone-to-sharded", begun_alone, sharded=True)

    witness.breaks = True
    told["broken"] = witness.distil("broken", usual)
    told["sharded-broken"] = witness.distil("sharded-broken", exact, sharded=True)
    told["first only"] = [refused_by_first(reason) for reason in (None, UsageError("No."))]
    group: Any = distributed.group.WORLD
    told["timeout_s"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    witness.breaks = False
    told["command line"] = witness.command(folder / "command")
    AcceleratorState._reset_state(reset_partial_state=True)  # the command has left the other process; they meet anew
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
    path = folder / f"told-{os.environ['RANK']}.json"
    path.write_text(json.dumps(told))
    told["lost"] = witness.command(folder / "lost", signals={2: signal.SIGKILL})
    path.write_text(json.dumps(told))


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    os.environ |= {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # as `accelerate launch` has it
    main(Path(sys.argv[1]))
