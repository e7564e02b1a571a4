"""distill: from a converted checkpoint and its teacher to a trained adapter, in a run folder that can be resumed."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hybridize.checkpoint import AtomicFolder, FolderLock, read_manifest, resolve_source, source_fingerprint
from hybridize.distillation.data import PackedSequences
from hybridize.distillation.lora import (
    Student,
    adapter_tensors,
    save_adapter,
    share_frozen_weights,
    with_present_tensors,
    wrap,
)
from hybridize.distillation.metrics import MetricsFile
from hybridize.distillation.processes import Processes, fit_processes, start_processes
from hybridize.distillation.run_state import RunState
from hybridize.distillation.settings import begin_or_compare, pinned_data, recorded_processes, run_settings
from hybridize.distillation.sharding import Sharding, gather, keep_gathered
from hybridize.distillation.signals import StopRequest, stop_requests
from hybridize.distillation.stages import TeacherAnswers
from hybridize.distillation.teacher import Teacher
from hybridize.distillation.teacher_cache import CachedTeacher, open_teacher_cache
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
        ProcessLostError: one of several processes ended or does not answer.
        StoppedError: a signal came and the state, or the adapter, is saved. InterruptedError_: before there was any.
        NumbersError: a loss or gradient is not finite.
    """
    if recipe.data is None or recipe.distill is None:
        missing = "data" if recipe.data is None else "distill"
        raise RecipeError(f"The recipe has no `{missing}`.", where=missing, hint="Both are needed to distil.")
    run = Path(run)
    base = Path.cwd() if base is None else base.absolute()
    folder = run / "distill"
    processes = start_processes()
    # Of several processes the first one writes; the others would find the lock taken.
    lock = FolderLock(folder) if processes.is_first else nullcontext()
    with processes.together(), stop_requests(launched=processes.count > 1) as stop, lock:
        folder.mkdir(parents=True, exist_ok=True)
        with processes.first_before_others():
            pinned = pinned_data(folder, recipe.data, base, offline=offline)
            begun_with = recorded_processes(folder) or processes.count
            settings = run_settings(recipe.distill, recipe.data, pinned, plan, base, processes=begun_with)
            identity = begin_or_compare(folder, settings)
        adapter = folder / ADAPTER_KIND
        if not _is_finished(adapter, identity):
            stages = fit_processes(recipe.distill, begun_with, processes.count)
            _train(Job(stages, pinned, plan, run, base, offline, identity), processes, reporter, stop)
        if processes.any(bool(stop)):  # came after the last step: what follows would not hear of it
            stop.met = True
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
    if processes.sharding is not None and distill.teacher_cache is not None:
        what = "A teacher cache does not go with sharded weights: each process would ask the teacher for other rows."
        raise RecipeError(what, where="distill.teacher_cache", hint="Remove it, or launch without FSDP.")
    seed_everything(seed)
    mixed = use_bfloat16(distill.precision, processes.device)
    converted = job.run / "converted"
    student, live = load_pair(converted, job.plan, distill, mixed, processes.device, job.offline, processes.sharding)
    teacher = _with_cache(job, live, reporter)
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
    snapshot, notes = state.load()
    for note in notes:
        reporter.note(note)
    processes.wait()
    resume_step = 0 if snapshot is None else snapshot.progress.step
    if snapshot is not None and processes.is_first:
        state.settle(snapshot.progress)
    metrics = MetricsFile(folder / "metrics.jsonl", resume_step) if processes.is_first else None
    try:
        Trainer(
            distill, job.data, student, teacher, sequences, state, metrics, processes, mixed, reporter, stop, seed
        ).train(snapshot)
    finally:
        if metrics is not None:
            metrics.close()
        if isinstance(teacher, CachedTeacher):
            teacher.close()
    tensors = gather(adapter_tensors(student), keep=processes.is_first)
    if processes.is_first:
        provenance = {"settings": job.identity, "model": job.plan.model, "teacher": job.plan.fingerprint}
        adapter = AtomicFolder(folder / ADAPTER_KIND, overwrite=True, kind=ADAPTER_KIND, provenance=provenance)
        with processes.undisturbed(), adapter as out:
            save_adapter(student, out, tensors)
        for report in folder.glob("failure*.json"):  # of an earlier attempt
            report.unlink()
    processes.wait()


def _with_cache(job: Job, teacher: Teacher, reporter: Reporter) -> TeacherAnswers:
    """The teacher, or what answers for it from a cache where the recipe has one."""
    settings = job.distill.teacher_cache
    if settings is None:
        return teacher
    fingerprint = source_fingerprint(resolve_source(job.plan.teacher, offline=job.offline), headers_only=False)
    return open_teacher_cache(
        settings, teacher, fingerprint=fingerprint, run=job.run / "distill", base=job.base, reporter=reporter
    )


def load_pair(
    converted: Path,
    plan: ConversionPlan,
    distill: Distill,
    mixed: bool,
    device: torch.device,
    offline: bool,
    sharding: Sharding | None = None,
) -> tuple[Student, Teacher]:
    """The student with its adapters and the teacher, on the device and in the form for training."""
    dtype: torch.dtype = getattr(torch, plan.dtype)
    frozen_dtype = torch.bfloat16 if mixed else torch.float32
    # What is trained starts from the checkpoint's own digits; only the frozen rest is rounded.
    student = wrap(load_hybrid(converted, dtype=dtype), distill.lora, frozen_dtype=frozen_dtype)
    teacher = Teacher(load_teacher(plan.teacher, dtype=dtype, offline=offline).to(frozen_dtype))
    return prepare_pair(student, teacher, share=distill.share_weights, device=device, sharding=sharding)


def prepare_pair(
    student: Student, teacher: Teacher, *, share: bool, device: torch.device, sharding: Sharding | None = None
) -> tuple[Student, Teacher]:
    """Puts a student and its teacher on the device, what they have in common once, and into the training form.

    sharding: how they are spread over the processes; None: each has both whole.
    """
    if share:
        share_frozen_weights(student, teacher.model)
    if sharding is not None:
        sharding.shard(student.model, teacher.model)
        keep_gathered(student.model, not sharding.reshard_after_forward)
        teacher.stops_early = False  # FSDP tidies up at the end of every forward pass
    for model in (student.peft, teacher.model):  # tensors that are shared move once
        model.to(device)
    student = with_present_tensors(student)
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
