"""The training loop: stages of optimiser steps, each of micro-batches; saved, stopped and resumed between two steps.

The host only queues work: batches are made a step ahead, numbers are read a step behind. A loss or gradient that is not
finite raises a flag on the device, and from then on the optimiser changes nothing; the host learns of it before
anything is saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.checkpoint import fault_point
from hybridize.distillation.ahead import Ahead
from hybridize.distillation.data import Batch, PackedSequences
from hybridize.distillation.failure import fail
from hybridize.distillation.gradients import clip
from hybridize.distillation.late_numbers import LateNumbers
from hybridize.distillation.log import StepLog, StepNote, mixer_numbers
from hybridize.distillation.lora import Student
from hybridize.distillation.memory import GpuMeter
from hybridize.distillation.metrics import MetricsFile
from hybridize.distillation.processes import Processes
from hybridize.distillation.recomputation import observed_once, recompute_by_need
from hybridize.distillation.recorded import recorded
from hybridize.distillation.run_state import (
    Progress,
    RunState,
    Snapshot,
    load_optimizer,
    optimizer_tensors,
    restore_random_states,
)
from hybridize.distillation.schedule import Shape, batch_shape, learning_rates, ramp_progress
from hybridize.distillation.sharding import gather, give_gradients, own_parameters, own_part, part_like
from hybridize.distillation.signals import StopRequest
from hybridize.distillation.stages import Measured, Step, TeacherAnswers, make_step
from hybridize.distillation.start_from_text import start_from_text
from hybridize.distillation.teacher_cache import CachedTeacher
from hybridize.errors import InterruptedError_, RecipeError, StoppedError
from hybridize.model.training_form import checkpointed
from hybridize.progress import Reporter
from hybridize.recipe.schema import Data, Distill, Stage

BETAS = (0.9, 0.95)
BAD, OWN_BAD, STOP = "bad", "own_bad", "stop"
"""Flags among a step's numbers: something is not finite, it is a loss of this process, a process is asked to stop."""
LateSteps = LateNumbers[tuple[StepNote, Progress]]
"""Steps whose numbers are still on the device: what the host knows of each, and where the run is after it."""
MEASURE_EVERY_STEPS = 10
"""Measurements that cost time are taken this often, in steps that are logged."""


@dataclass
class Micro:
    """A micro-batch and what the teacher said about it."""

    batch: Batch
    prepared: Any = None


@dataclass
class Trainer:
    """Trains a student through the stages of a recipe.

    Attributes:
        metrics: where steps are written; None in all processes but the first.
        processes: what is agreed upon and summed over all processes.
        mixed: forward and backward in bfloat16.
        stop: asks for a save and an end at the next step edge.
        seed: that the processes' own randomness starts from.
    """

    distill: Distill
    data: Data
    student: Student
    teacher: TeacherAnswers
    sequences: PackedSequences
    state: RunState
    metrics: MetricsFile | None
    processes: Processes
    mixed: bool
    reporter: Reporter
    stop: StopRequest
    seed: int
    progress: Progress = field(init=False)
    saved_step: int = field(init=False, default=0)
    _resumed: Snapshot | None = field(init=False, default=None)
    _own: dict[str, nn.Parameter] = field(init=False, default_factory=dict)
    """What the optimiser changes, by name: the trained parameters, or this process's parts of them."""

    def train(self, snapshot: Snapshot | None) -> None:
        """Runs every stage from the beginning, or from a snapshot to the end.

        Raises:
            StoppedError, InterruptedError_: a signal came; with or without something to go on from.
            NumbersError: a loss or gradient is not finite; nothing of that step is saved.
            RecipeError: a stage has nothing to train.
        """
        self.progress = Progress(0, 0, 0, self.sequences.state_dict(), 0, 0.0)
        if snapshot is not None:
            self._restore(snapshot)
        device = self.processes.device
        self._meter = GpuMeter(device) if device.type == "cuda" else None
        self._bad = torch.zeros((), device=device)
        self._stop_seen = self.processes.any(bool(self.stop))
        self._edge = time.perf_counter()
        with Ahead(self.sequences) as ahead:
            for index in range(self.progress.stage, len(self.distill.stages)):
                self._train_stage(index, ahead)
        self._schedule_mixers(1.0, self.data.sequence_tokens)
        self.student.model.eval()

    # One stage.

    def _train_stage(self, index: int, ahead: Ahead) -> None:
        stage = self.distill.stages[index]
        step = make_step(stage, self.student, self.teacher, self._autocast())
        self.student.model.train()
        self._set_gradient_checkpointing(stage)
        if self._meter is not None:
            self._meter.reset()
        shape, _ = self._wanted(index, 0)
        tokens = shape.sequences * shape.tokens
        step = recorded(step, self.student, tokens, self.processes.device, self.reporter.note)
        optimizer = self._optimizer(stage, step)
        first = self.progress.stage_step
        if self._resumed is not None:
            load_optimizer(optimizer, self._own, self.student.trained(), self._resumed.tensors)
            self._resumed = None
        numbers: LateSteps = LateNumbers(self.processes.device)
        micros: list[Micro] = []
        with self.reporter.task(f"{stage.name} ({stage.kind})", stage.steps) as task:
            if first:
                task.advance(first)
            log = StepLog(self.metrics, task)
            if stage.calibrate_sequences and not first:
                self._calibrate(stage, shape, ahead)
            for stage_step in range(first, stage.steps):
                self._stop_if_asked(optimizer, numbers, log)
                fault_point("step-start")
                use = _use(stage, stage_step)
                if use == 0 or not micros:
                    fetched = ahead.take(*self._wanted(index, stage_step), self._following(index, stage_step))
                    micros = [Micro(batch.to(self.processes.device)) for batch in fetched.batches]
                note, scalars = self._step(stage, stage_step, step, micros, optimizer)
                used_up = _use(stage, stage_step + 1) == 0 or stage_step + 1 == stage.steps
                self._advance(index, stage_step, fetched.place if used_up else None, fresh=use == 0)
                numbers.put((note, self.progress), scalars)
                self._read(numbers, log)
                if self.progress.step % self.distill.save_every_steps == 0 or stage_step + 1 == stage.steps:
                    self._save(optimizer, numbers, log)

    def _calibrate(self, stage: Stage, shape: Shape, ahead: Ahead) -> None:
        """What this changes is part of the first checkpoint; until there is one, a run begins from nothing.

        However many processes share the sequences, as many are taken off the stream.
        """
        own = -(-stage.calibrate_sequences // self.processes.count)
        fetched = ahead.take(replace(shape, sequences=1), own, self._wanted(0, 0))
        self.progress = replace(self.progress, data=fetched.place)
        batches = [batch.to(self.processes.device) for batch in fetched.batches]
        start_from_text(stage, self.student, self.teacher, batches, self.processes, self._autocast(), self.reporter)

    def _wanted(self, index: int, stage_step: int) -> tuple[Shape, int]:
        """Shape and number of the micro-batches of a step."""
        stage = self.distill.stages[index]
        return batch_shape(stage, self.data, stage_step), stage.accumulate

    def _following(self, index: int, stage_step: int) -> tuple[Shape, int] | None:
        """The same for the next step that takes new ones."""
        stage = self.distill.stages[index]
        stage_step += 1
        while _use(stage, stage_step):
            stage_step += 1
        if stage_step < stage.steps:
            return self._wanted(index, stage_step)
        return self._wanted(index + 1, 0) if index + 1 < len(self.distill.stages) else None

    def _step(
        self, stage: Stage, stage_step: int, step: Step, micros: Sequence[Micro], optimizer: torch.optim.Optimizer
    ) -> tuple[StepNote, dict[str, Tensor]]:
        """Queues a step; returns what is known of it, and its numbers on the device."""
        shape = batch_shape(stage, self.data, stage_step)
        self._schedule_mixers(ramp_progress(stage.budget_ramp, stage_step, stage.steps), shape.tokens)
        rates = learning_rates(stage, stage_step)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        optimizer.zero_grad(set_to_none=True)
        measured = self._backward(stage, stage_step, step, micros)
        groups = step.clip_groups()
        self.processes.average_gradients(parameter for group in groups for parameter in group)
        norms = clip(groups, stage.clip_norm, self.processes.sum)
        numbers = self._agree(measured, norms.total)
        optimizer.step()
        for _, mixer in self.student.mixers:
            mixer.after_step()
        logged = self._is_logged(stage, stage_step)
        metrics = {index: mixer.metrics() for index, mixer in self.student.mixers} if logged else {}
        note = StepNote(
            stage=stage,
            stage_step=stage_step + 1,
            step=self.progress.step + 1,
            tokens=shape.sequences * shape.tokens * len(micros) * self.processes.count,
            batches=tuple(micro.batch for micro in micros),
            rates={group["name"]: group["lr"] for group in optimizer.param_groups},
            norms=norms,
            mixers={
                index: {name: value for name, value in named.items() if not isinstance(value, Tensor)}
                for index, named in metrics.items()
                if named
            },
            logged=logged,
            peak_bytes=int(self._meter.peak_bytes()) if logged and self._meter is not None else 0,
        )
        return note, numbers | mixer_numbers(metrics)

    def _backward(self, stage: Stage, stage_step: int, step: Step, micros: Sequence[Micro]) -> Measured:
        """The gradient of a step, summed over its micro-batches; the means of what was measured."""
        summed: Measured = {}
        reused = stage.kind == "align" and stage.passes > 1
        measure = self._measures(stage, stage_step)
        for number, micro in enumerate(micros):
            if number:
                fault_point("mid-accumulation")
            prepared = step.prepare(micro.batch) if micro.prepared is None else micro.prepared
            if reused:
                micro.prepared = prepared
            with observed_once(self.student):
                measured = step.backward(prepared, 1 / len(micros), measure=measure)
            for name, value in measured.items():
                summed[name] = summed.get(name, 0.0) + value / len(micros)
        return summed

    def _agree(self, measured: Measured, norm: Tensor) -> dict[str, Tensor]:
        """Means over the processes; what is not finite anywhere stops every optimiser from this step on."""
        own = torch.stack([value.detach().float() for value in measured.values()])
        own_bad = 1 - own.isfinite().all().float()
        stop = torch.full_like(own_bad, float(bool(self.stop)))
        *means, bad, stop = self.processes.sum(torch.cat((own, torch.stack((own_bad, stop))))) / self.processes.count
        self._bad.copy_(torch.maximum(self._bad, torch.maximum(bad.ceil(), 1 - norm.isfinite().float())))
        numbers = dict(zip(measured, means, strict=True))
        return numbers | {"grad_norm": norm, BAD: self._bad, OWN_BAD: own_bad, STOP: stop}

    def _is_logged(self, stage: Stage, stage_step: int) -> bool:
        return (self.progress.step + 1) % self.distill.log_every_steps == 0 or stage_step + 1 == stage.steps

    def _measures(self, stage: Stage, stage_step: int) -> bool:
        log_every = self.distill.log_every_steps
        every = log_every * math.ceil(MEASURE_EVERY_STEPS / log_every)
        return stage_step == 0 or stage_step + 1 == stage.steps or (self.progress.step + 1) % every == 0

    def _optimizer(self, stage: Stage, step: Step) -> torch.optim.Optimizer:
        groups = self.student.train_only(step.groups)
        if not groups:
            hint = "Remove the stage, give `lora`, or choose a mixer that has something to learn."
            raise RecipeError(
                "No layer has a parameter that this stage trains.", where=f"stage {stage.name}", hint=hint
            )
        trained = self.student.trained()
        self._own = own_parameters({name: trained[name] for named in groups.values() for name in named})
        parameters = [
            {"name": group, "params": [self._own[name] for name in named], "lr": 0.0} for group, named in groups.items()
        ]
        optimizer = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=stage.weight_decay, fused=True)
        optimizer.found_inf = self._bad  # type: ignore[attr-defined]  # fused optimisers skip a step where it is 1
        give_gradients(optimizer, ((own, trained[name]) for name, own in self._own.items()))
        return optimizer

    def _schedule_mixers(self, progress: float, sequence_tokens: int) -> None:
        for _, mixer in self.student.mixers:
            mixer.schedule(progress, sequence_tokens)

    def _set_gradient_checkpointing(self, stage: Stage) -> None:
        wanted = self.distill.gradient_checkpointing
        if wanted == "auto" and stage.kind != "align":
            # By the teacher itself: what is asked here is not worth storing.
            teacher = self.teacher.teacher if isinstance(self.teacher, CachedTeacher) else self.teacher
            step = make_step(stage, self.student, teacher, self._autocast())
            recompute_by_need(stage, self.data, self.student, step, self.processes, self.reporter)
            return
        again = wanted is True and stage.kind != "align"
        checkpointed(self.student.model, range(self.student.model.config.num_hidden_layers) if again else ())

    def _autocast(self) -> Any:
        device = self.processes.device.type
        return torch.autocast(device, dtype=torch.bfloat16) if self.mixed else nullcontext()

    # Numbers, progress, saving, stopping.

    def _read(self, numbers: LateSteps, log: StepLog, *, everything: bool = False) -> None:
        for arrived in numbers.read(everything=everything):
            (note, progress), found = arrived.note, arrived.numbers
            flags = {name: found.pop(name) for name in (BAD, OWN_BAD, STOP)}
            if flags[BAD]:
                folder, own_loss = self.state.folder.parent, bool(flags[OWN_BAD])
                fail(folder, note, found, self.student, self.processes, self._autocast(), own_loss=own_loss)
            self._stop_seen |= flags[STOP] > 0
            log.write(note, found, progress, arrived.seconds)

    def _advance(self, index: int, stage_step: int, place: dict[str, Any] | None, *, fresh: bool) -> None:
        """Counts a step; `place` is that in the data after its micro-batches, None if they will be used again."""
        shape, count = self._wanted(index, stage_step)
        ended = stage_step + 1 == self.distill.stages[index].steps
        now = time.perf_counter()
        self.progress = Progress(
            step=self.progress.step + 1,
            stage=index + 1 if ended else index,
            stage_step=0 if ended else stage_step + 1,
            data=self.progress.data if place is None else place,
            tokens=self.progress.tokens + fresh * shape.sequences * shape.tokens * count * self.processes.count,
            seconds=self.progress.seconds + now - self._edge,
        )
        self._edge = now

    def _save(self, optimizer: torch.optim.Optimizer, numbers: LateSteps, log: StepLog) -> None:
        self._read(numbers, log, everything=True)
        if self.saved_step < self.progress.step:
            tensors = self._tensors_to_save(optimizer)
            if isinstance(self.teacher, CachedTeacher):
                self.teacher.flush()
            if self.metrics is not None:
                with self.processes.undisturbed():
                    self.metrics.sync()
                    self.state.save(self.progress, tensors)
        self.saved_step = self.progress.step
        self.processes.wait()

    def _tensors_to_save(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Whole tensors by name, in the first process; the others give it their parts."""
        trained, keep = self.student.trained(), self.processes.is_first
        tensors = self.processes.gather_random_states()
        tensors |= gather({f"model.{name}": parameter for name, parameter in trained.items()}, keep=keep)
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.student.buffers.items()}
        if self.progress.stage_step > 0:  # the next stage begins with a new optimiser
            tensors |= optimizer_tensors(optimizer, self._own, trained, keep=keep)
        return tensors

    def _restore(self, snapshot: Snapshot) -> None:
        self.progress = snapshot.progress
        self.saved_step = snapshot.progress.step
        self.sequences.load_state_dict(snapshot.progress.data)
        restore_random_states(snapshot.random_states, snapshot.tensors)
        self.processes.restore_random_state(snapshot.tensors, self.seed)
        own: dict[str, Tensor] = {f"model.{name}": p for name, p in self.student.trained().items()}
        own |= {f"buffer.{name}": buffer for name, buffer in self.student.buffers.items()}
        with torch.no_grad():
            for name, tensor in own.items():
                own_part(tensor).copy_(part_like(snapshot.tensors[name], tensor))
        self._resumed = snapshot

    def _stop_if_asked(self, optimizer: torch.optim.Optimizer, numbers: LateSteps, log: StepLog) -> None:
        # A signal may reach the processes in different steps: of several, all go by what they told each other.
        if not (self._stop_seen if self.processes.count > 1 else self.stop):
            return
        name = self.stop.name
        if self.progress.step == 0:
            raise InterruptedError_(f"Stopped by {name} before the first step.", hint="Run the same command to begin.")
        self._save(optimizer, numbers, log)
        self.stop.met = True
        raise StoppedError(f"Stopped by {name} after step {self.progress.step}; the state is saved.")


def _use(stage: Stage, stage_step: int) -> int:
    """How many times the micro-batches of a step were used before."""
    return stage_step % stage.passes if stage.kind == "align" else 0
