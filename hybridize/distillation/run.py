"""distill: from a converted checkpoint and its teacher to a trained adapter, in a run folder that can be resumed."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from hybridize.checkpoint import AtomicFolder, FolderLock, read_manifest
from hybridize.distillation.data import PackedSequences
from hybridize.distillation.lora import Student, save_adapter, share_frozen_weights, wrap
from hybridize.distillation.metrics import MetricsFile
from hybridize.distillation.processes import Processes
from hybridize.distillation.run_state import RunState
from hybridize.distillation.settings import begin_or_compare, pinned_data, run_settings
from hybridize.distillation.signals import StopRequest, stop_requests
from hybridize.distillation.teacher import Teacher
from hybridize.distillation.trainer import Trainer
from hybridize.errors import CheckpointError, RecipeError, StoppedError
from hybridize.model import training_form
from hybridize.model.load import load_hybrid, load_teacher, load_tokenizer
from hybridize.model.packed_attention import use_packed_attention
from hybridize.model.precision import computes_bfloat16
from hybridize.plan import ConversionPlan
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.probes import Precision
from hybridize.recipe.schema import Data, Distill, Recipe

ADAPTER_KIND = "adapter"


def distill(
    recipe: Recipe,
    run: Path,
    *,
    plan: ConversionPlan,
    base: Path | None = None,
    offline: bool = False,
    reporter: Reporter = SILENT,
) -> Path:
    """Trains the hybrid in `run/converted` against its teacher.

    The same call goes on from the last complete checkpoint, with the same result bit for bit on the same machine, and
    does nothing when the adapter is there.

    Args:
        recipe: with `data` and `distill`.
        run: the run folder; `run/distill` is written.
        plan: what `run/converted` was made from.
        base: folder that the recipe's text paths start from (that of the recipe file); None: the current one.
        offline: never ask the network.

    Returns:
        `run/distill/adapter`: a PEFT adapter on top of `run/converted`.

    Raises:
        RecipeError: no data or stages, or the settings are not those that the run began with.
        UsageError: another process trains in this run.
        StoppedError: a signal came and the state, or the adapter, is saved. InterruptedError_: before there was any.
        NumbersError: a loss or gradient is not finite.
    """
    if recipe.data is None or recipe.distill is None:
        missing = "data" if recipe.data is None else "distill"
        raise RecipeError(f"The recipe has no `{missing}`.", where=missing, hint="Both are needed to distil.")
    run = Path(run)
    base = Path.cwd() if base is None else base.absolute()
    folder = run / "distill"
    processes = Processes(Accelerator(mixed_precision="no"))
    # Of several processes the first one writes; the others would find the lock taken.
    with stop_requests() as stop, FolderLock(folder) if processes.is_first else nullcontext():
        folder.mkdir(parents=True, exist_ok=True)
        with processes.accelerator.main_process_first():
            pinned = pinned_data(folder, recipe.data, base, offline=offline)
            identity = begin_or_compare(folder, run_settings(recipe.distill, recipe.data, pinned, plan, base))
        adapter = folder / ADAPTER_KIND
        if not _is_finished(adapter, identity):
            job = Job(recipe.distill, pinned, plan, run, base, offline, identity)
            _train(job, processes, reporter, stop)
        if processes.any(bool(stop)):  # came after the last step: what follows would not hear of it
            raise StoppedError(f"Stopped by {stop.name}; the training is complete.")
    return adapter


@dataclass(frozen=True)
class Job:
    """What `distill` was asked for, settled: the data has fixed revisions, `identity` is the hash of the settings."""

    distill: Distill
    data: Data
    plan: ConversionPlan
    run: Path
    base: Path
    offline: bool
    identity: str


def _train(job: Job, processes: Processes, reporter: Reporter, stop: StopRequest) -> None:
    distill, folder, seed = job.distill, job.run / "distill", job.plan.seed
    seed_everything(seed)
    mixed = use_bfloat16(distill.precision, processes.device)
    converted = job.run / "converted"
    student, teacher = load_pair(converted, job.plan, distill, mixed, processes.device, job.offline)
    processes.seed(seed)
    sequences = PackedSequences.from_recipe(
        job.data,
        load_tokenizer(converted),
        base=job.base,
        seed=seed,
        offline=job.offline,
        rank=processes.index,
        num=processes.count,
    )
    state = RunState(folder / "checkpoints", distill.keep_checkpoints)
    snapshot, notes = state.load(processes.device)
    for note in notes:
        reporter.note(note)
    processes.wait()
    resume_step = 0 if snapshot is None else snapshot.progress.step
    metrics = MetricsFile(folder / "metrics.jsonl", resume_step) if processes.is_first else None
    try:
        Trainer(
            distill, job.data, student, teacher, sequences, state, metrics, processes, mixed, reporter, stop, seed
        ).train(snapshot)
    finally:
        if metrics is not None:
            metrics.close()
    if processes.is_first:
        provenance = {"settings": job.identity, "model": job.plan.model, "teacher": job.plan.fingerprint}
        with AtomicFolder(folder / ADAPTER_KIND, overwrite=True, kind=ADAPTER_KIND, provenance=provenance) as out:
            save_adapter(student, out)
        for report in folder.glob("failure*.json"):  # of an earlier attempt
            report.unlink()
    processes.wait()


def load_pair(
    converted: Path, plan: ConversionPlan, distill: Distill, mixed: bool, device: torch.device, offline: bool
) -> tuple[Student, Teacher]:
    """The student with its adapters and the teacher, on the device and in the form for training."""
    dtype: torch.dtype = getattr(torch, plan.dtype)
    frozen_dtype = torch.bfloat16 if mixed else torch.float32
    # What is trained starts from the checkpoint's own digits; only the frozen rest is rounded.
    student = wrap(load_hybrid(converted, dtype=dtype), distill.lora, frozen_dtype=frozen_dtype)
    teacher = Teacher(load_teacher(plan.teacher, dtype=dtype, offline=offline).to(frozen_dtype))
    return prepare_pair(student, teacher, share=distill.share_weights, device=device)


def prepare_pair(student: Student, teacher: Teacher, *, share: bool, device: torch.device) -> tuple[Student, Teacher]:
    """Puts a student and its teacher on the device, what they have in common once, and into the training form."""
    if share:
        share_frozen_weights(student, teacher.model)
    for model in (student.peft, teacher.model):  # tensors that are shared move once
        model.to(device)
    for model in (student.model, teacher.model):
        use_packed_attention(model)
        training_form.enter(model)
    return student, teacher


def use_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether forward and backward run in bfloat16: as said, or where the device computes it natively."""
    if precision != "auto":
        return precision == "bfloat16"
    return computes_bfloat16(device)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _is_finished(adapter: Path, identity: str) -> bool:
    try:
        manifest = read_manifest(adapter)
    except CheckpointError:
        return False
    return manifest.kind == ADAPTER_KIND and manifest.provenance.get("settings") == identity
