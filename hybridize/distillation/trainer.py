"""The training loop: stages of optimiser steps, each of micro-batches; saved, stopped and resumed between two steps."""

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
from hybridize.distillation.data import Batch, PackedSequences
from hybridize.distillation.failure import failure_name, first_bad_layer, random_digests, write_failure
from hybridize.distillation.lora import Student
from hybridize.distillation.metrics import MetricsFile
from hybridize.distillation.processes import any_process, gather_random_states, restore_random_state
from hybridize.distillation.run_state import (
    Progress,
    RunState,
    Snapshot,
    load_optimizer,
    optimizer_tensors,
    restore_random_states,
)
from hybridize.distillation.schedule import learning_rates, ramp_progress
from hybridize.distillation.signals import StopRequest
from hybridize.distillation.stages import Step, make_step
from hybridize.distillation.teacher import Teacher
from hybridize.errors import InterruptedError_, NumbersError, RecipeError, StoppedError
from hybridize.progress import Reporter, Task
from hybridize.recipe.schema import Data, Distill, Stage

BETAS = (0.9, 0.95)
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
        accelerator: an `accelerate.Accelerator`: the device, the processes, and what is summed over them.
        mixed: forward and backward in bfloat16.
        stop: asks for a save and an end at the next step edge.
        seed: that the processes' own randomness starts from.
    """

    distill: Distill
    data: Data
    student: Student
    teacher: Teacher
    sequences: PackedSequences
    state: RunState
    metrics: MetricsFile | None
    accelerator: Any
    mixed: bool
    reporter: Reporter
    stop: StopRequest
    seed: int
    progress: Progress = field(init=False)
    saved_step: int = field(init=False, default=0)
    _resumed: Snapshot | None = field(init=False, default=None)

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
        for index in range(self.progress.stage, len(self.distill.stages)):
            self._train_stage(index, self.distill.stages[index])
        self._schedule_mixers(1.0, self.data.sequence_tokens)
        self.student.model.eval()

    # One stage.

    def _train_stage(self, index: int, stage: Stage) -> None:
        step = make_step(stage, self.student, self.teacher, self._autocast())
        self.student.model.train()
        self._set_gradient_checkpointing(stage)
        optimizer = self._optimizer(stage, step)
        first = self.progress.stage_step
        if self._resumed is not None:
            load_optimizer(optimizer, self.student.trained(), self._resumed.tensors)
            self._resumed = None
        micros: list[Micro] = []
        with self.reporter.task(f"{stage.name} ({stage.kind})", stage.steps) as task:
            if first:
                task.advance(first)
            for stage_step in range(first, stage.steps):
                self._stop_if_asked(optimizer)
                fault_point("step-start")
                begun = time.perf_counter()
                use = stage_step % stage.passes if stage.kind == "align" else 0
                if use == 0 or not micros:
                    micros = [Micro(self._next_batch(stage)) for _ in range(stage.accumulate)]
                measured = self._step(stage, stage_step, step, micros, optimizer)
                last_use = stage.kind != "align" or use == stage.passes - 1
                self._advance(index, stage, stage_step, begun, fresh=use == 0, used_up=last_use)
                self._log(stage, stage_step, measured, time.perf_counter() - begun, task)
                if self.progress.step % self.distill.save_every_steps == 0 or stage_step + 1 == stage.steps:
                    self._save(optimizer)

    def _step(
        self, stage: Stage, stage_step: int, step: Step, micros: Sequence[Micro], optimizer: torch.optim.Optimizer
    ) -> dict[str, float]:
        sequence_tokens = stage.sequence_tokens or self.data.sequence_tokens
        self._schedule_mixers(ramp_progress(stage.budget_ramp, stage_step, stage.steps), sequence_tokens)
        rates = learning_rates(stage, stage_step)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        optimizer.zero_grad(set_to_none=True)
        summed: dict[str, Tensor] = {}
        reused = stage.kind == "align" and stage.passes > 1
        measure = self._measures(stage, stage_step)
        for number, micro in enumerate(micros):
            if number:
                fault_point("mid-accumulation")
            prepared = step.prepare(micro.batch) if micro.prepared is None else micro.prepared
            if reused:
                micro.prepared = prepared
            for name, value in step.backward(prepared, 1 / len(micros), measure=measure).items():
                summed[name] = summed.get(name, 0.0) + value / len(micros)
        measured = {name: float(value) for name, value in summed.items()}
        self._require_finite_losses(measured, stage, micros)
        measured["grad_norm"] = self._clip(stage, step, micros)
        optimizer.step()
        for _, mixer in self.student.mixers:
            mixer.after_step()
        return measured | {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}

    def _measures(self, stage: Stage, stage_step: int) -> bool:
        log_every = self.distill.log_every_steps
        every = log_every * math.ceil(MEASURE_EVERY_STEPS / log_every)
        return stage_step == 0 or stage_step + 1 == stage.steps or (self.progress.step + 1) % every == 0

    def _next_batch(self, stage: Stage) -> Batch:
        tokens = stage.sequence_tokens or self.data.sequence_tokens
        batch = self.sequences.next_batch(stage.batch_sequences, tokens)
        return replace(batch, tokens=batch.tokens.to(self.accelerator.device))

    def _optimizer(self, stage: Stage, step: Step) -> torch.optim.Optimizer:
        groups = self.student.train_only(step.groups)
        if not groups:
            hint = "Remove the stage, give `lora`, or choose a mixer that has something to learn."
            raise RecipeError(
                "No layer has a parameter that this stage trains.", where=f"stage {stage.name}", hint=hint
            )
        parameters = [{"name": name, "params": list(named.values()), "lr": 0.0} for name, named in groups.items()]
        return torch.optim.AdamW(parameters, betas=BETAS, weight_decay=stage.weight_decay)

    def _clip(self, stage: Stage, step: Step, micros: Sequence[Micro]) -> float:
        """Clips, and returns the norm of the whole gradient."""
        groups = step.clip_groups()
        if self.accelerator.num_processes > 1:
            for parameter in (p for group in groups for p in group if p.grad is not None):
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norms = []
        for group in groups:
            gradients = [parameter.grad for parameter in group if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            if not math.isfinite(norm):
                name = self._first_bad_gradient()
                self._fail(f"The gradient of {name} is not finite", stage, micros, {"parameter": name})
            nn.utils.clip_grads_with_norm_(group, stage.clip_norm, norm)
            norms.append(float(norm))
        return math.sqrt(sum(norm**2 for norm in norms))

    def _first_bad_gradient(self) -> str:
        """Name of the first trained parameter with NaN or Inf in its gradient, before anything was clipped."""
        trained = self.student.trained().items()
        bad = (name for name, p in trained if p.grad is not None and not bool(p.grad.isfinite().all()))
        return next(bad, "all parameters together")

    def _schedule_mixers(self, progress: float, sequence_tokens: int) -> None:
        for _, mixer in self.student.mixers:
            mixer.schedule(progress, sequence_tokens)

    def _set_gradient_checkpointing(self, stage: Stage) -> None:
        if self.distill.gradient_checkpointing:
            set_gradient_checkpointing(self.student.model, stage.kind != "align")

    def _autocast(self) -> Any:
        device = self.accelerator.device.type
        return torch.autocast(device, dtype=torch.bfloat16) if self.mixed else nullcontext()

    # Numbers.

    def _require_finite_losses(self, measured: dict[str, float], stage: Stage, micros: Sequence[Micro]) -> None:
        bad = [name for name, value in measured.items() if not math.isfinite(value)]
        failed = any_process(self.accelerator, bool(bad))  # else the others would wait for this one
        if bad:
            bad.sort(key=lambda name: name in ("loss", "error"))  # sums and means say less than their parts
            what = f"{bad[0].replace('_', ' ').capitalize()} is not finite ({measured[bad[0]]})"
            self._fail(what, stage, micros, {"losses": measured})
        if failed:
            where = f"stage {stage.name}, step {self.progress.stage_step + 1}"
            raise NumbersError("A loss in another process is not finite; that process says which.", where=where)

    def _fail(self, what: str, stage: Stage, micros: Sequence[Micro], found: dict[str, Any]) -> None:
        """Writes all that is known to a file beside the checkpoints, and raises the part that fits a sentence."""
        documents = list(dict.fromkeys(identity for micro in micros for identity in micro.batch.documents))
        path = self.state.folder.parent / failure_name(self.accelerator.process_index)
        digests = random_digests()
        layer = None
        if "parameter" not in found:
            named = [name for name, value in found["losses"].items() if not math.isfinite(value)]
            layers = [int(name.removeprefix("layer_")) for name in named if name.startswith("layer_")]
            layer = layers[0] if layers else self._first_bad_layer(micros)
        facts = {
            "what": what,
            "stage": stage.name,
            "stage_step": self.progress.stage_step + 1,
            "step": self.progress.step + 1,
            "layer": layer,
            **found,
            "documents": documents,
            "learning_rates": learning_rates(stage, self.progress.stage_step),
            "random_states": digests,
        }
        write_failure(path, facts)
        shown = ", ".join(documents[:4]) + (f" and {len(documents) - 4} more" if len(documents) > 4 else "")
        where = f"stage {stage.name}, step {self.progress.stage_step + 1}"
        file = f"{path.parent.name}/{path.name}"
        hint = f"See {file}; lower the learning rate, or look at the documents. The state saved before is untouched."
        raise NumbersError(f"{what}; the batch holds {shown}.", where=where, hint=hint)

    def _first_bad_layer(self, micros: Sequence[Micro]) -> int | None:
        """Of the student as it is now."""
        with self._autocast():
            return first_bad_layer(self.student.model, [micro.batch.tokens for micro in micros])

    # Progress, saving, stopping.

    def _advance(self, index: int, stage: Stage, stage_step: int, begun: float, *, fresh: bool, used_up: bool) -> None:
        sequences = stage.batch_sequences * stage.accumulate * self.accelerator.num_processes
        tokens = sequences * (stage.sequence_tokens or self.data.sequence_tokens)
        ended = stage_step + 1 == stage.steps
        self.progress = Progress(
            step=self.progress.step + 1,
            stage=index + 1 if ended else index,
            stage_step=0 if ended else stage_step + 1,
            data=self.sequences.state_dict() if used_up or ended else self.progress.data,
            tokens=self.progress.tokens + (tokens if fresh else 0),
            seconds=self.progress.seconds + time.perf_counter() - begun,
        )

    def _log(self, stage: Stage, stage_step: int, measured: dict[str, float], seconds: float, task: Task) -> None:
        tokens = stage.batch_sequences * stage.accumulate * (stage.sequence_tokens or self.data.sequence_tokens)
        tokens_per_s = tokens * self.accelerator.num_processes / seconds
        mixers = {str(index): metrics for index, mixer in self.student.mixers if (metrics := mixer.metrics())}
        kept = [metrics["kept_tokens_mean"] for metrics in mixers.values() if "kept_tokens_mean" in metrics]
        fields = {"loss": f"{measured['loss']:.4g}", "tokens/s": f"{tokens_per_s:,.0f}"}
        if "error" in measured:
            fields["error"] = f"{measured['error']:.3g}"
        if kept:
            fields["kept"] = f"{sum(kept) / len(kept):.0f}"
        task.advance(1, **fields)
        is_last = stage_step + 1 == stage.steps
        if self.metrics is None or (self.progress.step % self.distill.log_every_steps and not is_last):
            return
        losses = {name: value for name, value in measured.items() if not name.startswith("layer_")}
        layers = {name.removeprefix("layer_"): v for name, v in measured.items() if name.startswith("layer_")}
        self.metrics.write(
            {
                "step": self.progress.step,
                "stage": stage.name,
                "stage_step": stage_step + 1,
                **losses,
                **({"layers": layers} if layers else {}),
                **({"mixers": mixers} if mixers else {}),
                "tokens": self.progress.tokens,
                "tokens_per_s": round(tokens_per_s, 1),
                "seconds": round(self.progress.seconds, 3),
            }
        )

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        others = gather_random_states(self.accelerator) if self.saved_step < self.progress.step else {}
        if self.metrics is not None and self.saved_step < self.progress.step:
            trained = self.student.trained()
            names = {id(parameter): name for name, parameter in trained.items()}
            tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in trained.items()}
            tensors |= {f"buffer.{name}": buffer for name, buffer in self.student.buffers.items()}
            tensors |= others
            stage_goes_on = self.progress.stage_step > 0  # the next stage begins with a new optimiser
            self.metrics.sync()
            self.state.save(self.progress, tensors | (optimizer_tensors(optimizer, names) if stage_goes_on else {}))
        self.saved_step = self.progress.step
        self.accelerator.wait_for_everyone()

    def _restore(self, snapshot: Snapshot) -> None:
        self.progress = snapshot.progress
        self.saved_step = snapshot.progress.step
        self.sequences.load_state_dict(snapshot.progress.data)
        restore_random_states(snapshot.random_states, snapshot.tensors)
        restore_random_state(self.accelerator, snapshot.tensors, self.seed)
        own: dict[str, Tensor] = {f"model.{name}": p for name, p in self.student.trained().items()}
        own |= {f"buffer.{name}": buffer for name, buffer in self.student.buffers.items()}
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(snapshot.tensors[name])
        self._resumed = snapshot

    def _stop_if_asked(self, optimizer: torch.optim.Optimizer) -> None:
        if not any_process(self.accelerator, bool(self.stop)):  # it may reach the processes in different steps
            return
        name = self.stop.name
        if self.progress.step == 0:
            raise InterruptedError_(f"Stopped by {name} before the first step.", hint="Run the same command to begin.")
        self._save(optimizer)
        raise StoppedError(f"Stopped by {name} after step {self.progress.step}; the state is saved.")


def set_gradient_checkpointing(model: Any, on: bool) -> None:
    """Turns recomputation in the backward pass on or off, by whichever name this transformers has for it."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        options = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{word}_checkpointing_enable")(**options)
    else:
        getattr(model, f"{word}_checkpointing_disable")()
