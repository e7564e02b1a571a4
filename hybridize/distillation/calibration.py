"""calibrate: the time, memory and disk of a distillation on this machine, from a rehearsal of a minute or so.

The rehearsal has a process of its own, so that its peak of memory is its own, and so that running out of it is a
sentence and not an end.
"""

from __future__ import annotations

import copy
import importlib.metadata
import multiprocessing
import os
import platform
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import resolve_source
from hybridize.checkpoint.resources import existing_parent
from hybridize.distillation.data import NUM_LANES, Batch, PackedSequences
from hybridize.distillation.forecast import (
    Part,
    Rehearsed,
    Saving,
    StageForecast,
    forecast_part,
    parts_of,
    problem_of,
    saves_of,
)
from hybridize.distillation.lora import Student, wrap
from hybridize.distillation.processes import start_processes
from hybridize.distillation.rehearsal import Rehearser, is_out_of_memory
from hybridize.distillation.run import prepare_pair, seed_everything, use_bfloat16
from hybridize.distillation.teacher import Teacher
from hybridize.errors import CheckpointError, HybridizeError, RecipeError, ResourceError, UsageError
from hybridize.families import family_of_config
from hybridize.model.load import load_tokenizer
from hybridize.model.swap import swap
from hybridize.plan import ConversionPlan
from hybridize.plan.bill import ELEMENT_BYTES
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.documents import source_format
from hybridize.recipe.schema import Data, Distill, Recipe

SECONDS = 60.0
"""For the steps of the rehearsal, all together."""
READ_BYTES_PER_S = 500e6
"""Assumed: a checkpoint is read, hashed and looked through at this rate."""
_VERSIONS = ("torch", "triton", "transformers", "peft")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """What a distillation will take on the device that it was calibrated on, in one process.

    Attributes:
        device: its name. versions: of what computes.
        calibration_seconds: that the rehearsal took.
        tokens: where its tokens came from.
        stages: one by one.
        start_seconds: before the first step: modules, checkpoints at an assumed rate, adapters, first documents.
        first_steps_seconds: that the first steps took beyond later ones. Not in the total: what they compile is kept on
            disk, and the run finds it there.
        end_seconds: to write the adapter.
        capacity_bytes: of the device's memory, what one process may have.
        disk_bytes: checkpoints and adapter.
    """

    device: str
    versions: Mapping[str, str]
    calibration_seconds: float
    tokens: str
    stages: tuple[StageForecast, ...]
    start_seconds: float
    first_steps_seconds: float
    end_seconds: float
    capacity_bytes: float
    disk_bytes: int

    @property
    def total_seconds(self) -> float:
        return self.start_seconds + sum(stage.seconds for stage in self.stages) + self.end_seconds

    @property
    def peak_bytes(self) -> float:
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the run will fail as it is; empty if it will not."""
        return tuple(stage.problem for stage in self.stages if stage.problem)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "device": self.device,
            "versions": dict(self.versions),
            "calibration_seconds": self.calibration_seconds,
            "tokens": self.tokens,
            "stages": [stage.to_json() for stage in self.stages],
            "start_seconds": self.start_seconds,
            "assumed_read_bytes_per_s": READ_BYTES_PER_S,
            "first_steps_seconds": self.first_steps_seconds,
            "end_seconds": self.end_seconds,
            "total_seconds": self.total_seconds,
            "peak_bytes": round(self.peak_bytes),
            "capacity_bytes": self.capacity_bytes if self.capacity_bytes < float("inf") else None,
            "disk_bytes": self.disk_bytes,
            "problems": list(self.problems),
        }


@dataclass(frozen=True)
class Request:
    """What is to be calibrated.

    Attributes:
        base: folder that the recipe's text paths start from.
        folder: empty; for a checkpoint.
        seconds: for all steps together.
        asked_at: seconds since the epoch.
    """

    distill: Distill
    data: Data
    plan: ConversionPlan
    base: Path
    folder: Path
    seconds: float
    asked_at: float


def calibrate(
    recipe: Recipe,
    plan: ConversionPlan,
    *,
    base: Path | None = None,
    out: Path | None = None,
    seconds: float = SECONDS,
    reporter: Reporter = SILENT,
) -> Calibration:
    """Predicts what the distillation of a recipe takes on this machine, from a few steps of every stage and shape.

    The model has random weights and the plan's sizes; no checkpoint is read. Shapes that are too slow for the time are
    run with fewer tokens and scaled in proportion, as the result says.

    Args:
        recipe: with `data` and `distill`.
        plan: of the recipe.
        base: folder that the recipe's text paths start from; None: the current one.
        out: folder of the run, which need not be there, or one on the same disk; None: that of temporary files.
        seconds: for all steps together, without compiling kernels; a stage takes longer where its fewest steps do.

    Raises:
        RecipeError: no data or stages.
        UsageError: a launcher started several processes.
        ResourceError: a stage does not fit into memory in any shape, or a checkpoint on the disk.
    """
    if recipe.data is None or recipe.distill is None:
        missing = "data" if recipe.data is None else "distill"
        raise RecipeError(f"The recipe has no `{missing}`.", where=missing, hint="Both are needed to calibrate.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("Calibration is for one process.", where="WORLD_SIZE", hint="Start it without a launcher.")
    base = Path.cwd() if base is None else base.absolute()
    disk = None if out is None else existing_parent(out)
    with tempfile.TemporaryDirectory(prefix="hybridize-calibration-", dir=disk) as folder:
        request = Request(recipe.distill, recipe.data, plan, base, Path(folder), seconds, time.time())
        return _in_child(request, reporter)


def _in_child(request: Request, reporter: Reporter) -> Calibration:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, request), daemon=True)
    child.start()
    sender.close()  # so that the child's end is seen
    doing = ""
    try:
        with reporter.task("calibrate", total=len(parts_of(request.distill, request.data))) as task:
            while not isinstance(message := receiver.recv(), Calibration):
                if isinstance(message, BaseException):
                    raise message
                task.advance(1 if doing else 0, step=message)
                doing = message
            task.advance(1)
            return message
    except EOFError:
        child.join()
        what = f"The rehearsal ended with exit status {child.exitcode} at: {doing or 'the model'}."
        hint = "If the system has ended it for memory: fewer batch_sequences, or gradient_checkpointing: true."
        raise ResourceError(what, where="memory", hint=hint) from None
    finally:
        child.kill()
        child.join()


def _child(sender: Connection, request: Request) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent, which ends this process
    warnings.simplefilter("ignore")  # what one library wants to tell another is no news for the user
    try:
        sender.send(measure(request, sender.send))
    except HybridizeError as error:
        sender.send(error)
    except Exception as error:
        if is_out_of_memory(error):
            what = "There is not enough memory for the model itself, its teacher and what is trained."
            sender.send(ResourceError(what, where="memory", hint="Take a device with more, or precision: bfloat16."))
        else:
            sender.send(RuntimeError("".join(traceback.format_exception(error))))


def measure(request: Request, tell: Tell = lambda doing: None) -> Calibration:
    """The rehearsal, in this process.

    Args:
        tell: is told what is done next.
    """
    distill, plan = request.distill, request.plan
    imported_s = time.time() - request.asked_at
    begin = time.perf_counter()
    processes = start_processes()
    seed_everything(plan.seed)
    mixed = use_bfloat16(distill.precision, processes.device)
    model = random_teacher(plan, processes.device, torch.bfloat16 if mixed else torch.float32)
    built = time.perf_counter()
    pair = random_pair(model, plan, distill, processes.device)
    sequences, tokens = sequences_for(request)
    prepared_s = time.perf_counter() - built
    rehearser = Rehearser(
        distill, request.data, pair, sequences, processes, mixed=mixed, seed=plan.seed, folder=request.folder
    )
    rehearsed: list[tuple[Part, Rehearsed]] = []
    parts = parts_of(distill, request.data)
    for number, part in enumerate(parts):
        shape = f"{part.shape.sequences} x {part.shape.tokens:,} tokens"
        tell(f"{part.stage.name}, {shape}{', moving budget' if part.ramping else ''}")
        left_s = max(request.seconds - rehearser.spent_s, 0.0)
        rehearsed.append((part, rehearser.rehearse(part, left_s / (len(parts) - number))))
    capacity = rehearser.meter.capacity_bytes()
    saved_bytes = max(saving.bytes for saving in rehearser.savings.values())
    adapter_bytes = 4 * sum(parameter.numel() for parameter in pair[0].trained().values())
    return Calibration(
        device=device_name(processes.device),
        versions=versions(),
        calibration_seconds=time.perf_counter() - begin,
        tokens=tokens,
        stages=forecast_stages(distill, rehearsed, rehearser.savings, capacity, adapter_bytes),
        start_seconds=imported_s + prepared_s + loaded_bytes(plan) / READ_BYTES_PER_S,
        first_steps_seconds=sum(found.first_steps_seconds for _, found in rehearsed),
        end_seconds=_writing_seconds(rehearser.savings, adapter_bytes),
        capacity_bytes=capacity,
        # One checkpoint more than is kept: the newest is whole before the oldest goes.
        disk_bytes=saved_bytes * (distill.keep_checkpoints + 1) + adapter_bytes,
    )


def forecast_stages(
    distill: Distill,
    rehearsed: list[tuple[Part, Rehearsed]],
    savings: Mapping[str, Saving],
    capacity_bytes: float,
    adapter_bytes: int,
) -> tuple[StageForecast, ...]:
    """Every stage's forecast from what its parts took.

    Args:
        savings: a checkpoint within a stage, by the stage's kind.
        adapter_bytes: of everything that is trained, without an optimiser: a checkpoint at a stage's end.
    """
    saves, stages = saves_of(distill), []
    for stage in distill.stages:
        own = [(part, forecast_part(part, found, capacity_bytes)) for part, found in rehearsed if part.stage == stage]
        recomputes = distill.gradient_checkpointing is not False and stage.kind != "align"
        problems = (problem_of(part, one, capacity_bytes, recomputes=recomputes) for part, one in own)
        within, at_end = saves[stage.name]
        saving_s = within * savings[stage.kind].seconds + at_end * _writing_seconds(savings, adapter_bytes)
        stages.append(
            StageForecast(
                name=stage.name,
                kind=stage.kind,
                parts=tuple(one for _, one in own),
                saving_seconds=saving_s,
                problem=next((problem for problem in problems if problem), ""),
            )
        )
    return tuple(stages)


def _writing_seconds(savings: Mapping[str, Saving], size_bytes: int) -> float:
    """For a checkpoint of this size, in proportion to those that were written."""
    rate = sum(saving.bytes for saving in savings.values()) / sum(saving.seconds for saving in savings.values())
    return size_bytes / rate


# What is rehearsed with.


def random_teacher(plan: ConversionPlan, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of the teacher's class and sizes, made on the device."""
    config_class, _, _ = family_of_config(plan.teacher_config)[0].base_classes()
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_class(**plan.teacher_config), dtype=dtype)


def random_pair(model: Any, plan: ConversionPlan, distill: Distill, device: torch.device) -> tuple[Student, Teacher]:
    """The student that a plan makes of a teacher, and the teacher, as a run has them on the device."""
    # Weights that a run would find to be equal are one from the start, so that they never are there twice.
    shared = {id(parameter): parameter for parameter in model.parameters()} if distill.share_weights else {}
    hybrid = swap(copy.deepcopy(model, shared), plan.layers)
    student = wrap(hybrid, distill.lora, frozen_dtype=model.dtype)
    return prepare_pair(student, Teacher(model), share=distill.share_weights, device=device)


class RandomSequences(PackedSequences):
    """Tokens by chance, one text a row; there is no place to come back to."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self.vocabulary = vocabulary
        self._generator = torch.Generator().manual_seed(seed)

    def next_batches(self, count: int, num_sequences: int, sequence_tokens: int) -> tuple[Batch, ...]:
        shape = (count, num_sequences, sequence_tokens)
        tokens: Tensor = torch.randint(0, self.vocabulary, shape, generator=self._generator)
        return tuple(Batch(each, documents=()) for each in tokens)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def sequences_for(request: Request) -> tuple[PackedSequences, str]:
    """The recipe's own texts if they and a tokenizer are on this machine, else tokens by chance; and which it is."""
    data, plan = request.data, request.plan
    try:
        if any(source_format(source, request.base) == "hub" for source in data.train):
            raise RecipeError("The texts are on the Hub.")
        tokenizer = load_tokenizer(resolve_source(plan.teacher, offline=True, weights=False))
        sequences = PackedSequences.from_recipe(data, tokenizer, base=request.base, seed=plan.seed, offline=True)
        sequences.next_batch(NUM_LANES, 2)  # finds out whether they can be read, and makes the first ones ready
    except (CheckpointError, RecipeError) as error:
        return RandomSequences(plan.geometry.vocab_size, plan.seed), f"by chance, one text a row: {error.what}"
    return sequences, "of the recipe's texts"


def loaded_bytes(plan: ConversionPlan) -> int:
    """Of the two checkpoints that a run begins with: the hybrid and the teacher."""
    return plan.bill.checkpoint_bytes + plan.bill.teacher_parameters * ELEMENT_BYTES[plan.dtype]


def device_name(device: torch.device) -> str:
    """For people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of what computes, as far as it is there."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
