"""A distillation rehearsed: a few steps of every stage and shape, taken by the trainer itself, of random weights.

Neither time nor memory depends on what the weights are, so no checkpoint is read. What would take too long, or does not
fit, is rehearsed with fewer tokens.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint import require_free_disk
from hybridize.distillation.data import PackedSequences
from hybridize.distillation.forecast import Kind, Part, Rehearsed, Saving
from hybridize.distillation.lora import Student
from hybridize.distillation.memory import GpuMeter, Meter, meter_of
from hybridize.distillation.metrics import MetricsFile
from hybridize.distillation.processes import Processes
from hybridize.distillation.recomputation import Line
from hybridize.distillation.run_state import Progress, RunState
from hybridize.distillation.schedule import Shape
from hybridize.distillation.stopwatch import Stopwatch
from hybridize.distillation.teacher import Teacher
from hybridize.distillation.trainer import MEASURE_EVERY_STEPS, Trainer
from hybridize.errors import ResourceError, StoppedError
from hybridize.model.training_form import checkpointed, recomputed_layers
from hybridize.recipe.schema import Data, Distill, Stage

SHORTEST_TOKENS = 128
"""No sequence is rehearsed shorter than this, unless the stage has it so."""
_UNREACHED_STEPS = 1_000_000
_STILL = 1e-9
"""A learning rate at which nothing is learnt."""
_WOBBLE = 0.02
"""Of a ramp's progress from one step to the next, so that the budget moves."""
_SETTLING_STEPS = {"cuda": 3}
"""First steps that are unlike the later ones: one compiles, one is recorded, one is the first to be replayed."""


@dataclass(frozen=True)
class Size:
    """Of a step."""

    shape: Shape
    accumulate: int

    @property
    def tokens(self) -> int:
        return self.shape.sequences * self.shape.tokens * self.accumulate


def ladder(shape: Shape, accumulate: int) -> list[Size]:
    """Sizes from one short sequence up to a whole step, each about twice the one before.

    On the way down from the whole, micro-batches go first, which changes least; then sequences; then their length.
    """
    sizes = [Size(shape, accumulate)]
    while True:
        size = sizes[-1]
        sequences, tokens = size.shape.sequences, size.shape.tokens
        if size.accumulate > 1:
            sizes.append(Size(size.shape, size.accumulate // 2))
        elif sequences > 1:
            sizes.append(Size(Shape(sequences // 2, tokens), 1))
        elif tokens >= 2 * SHORTEST_TOKENS:
            sizes.append(Size(Shape(1, tokens // 2), 1))
        else:
            return sizes[::-1]


class _NoMetrics(MetricsFile):
    """A trainer saves only where it writes metrics."""

    def __init__(self) -> None: ...

    def write(self, row: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class _TimedState(RunState):
    """Takes notes when a trainer saves; really writes when told to."""

    def __init__(self, folder: Path, meter: Meter, clock: Callable[[], float]) -> None:
        super().__init__(folder, keep=1)
        self.meter, self.clock = meter, clock
        self.writes = False
        self.held_bytes = 0.0
        self.saving: Saving | None = None

    def save(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        self.held_bytes = self.meter.held_bytes()
        if not self.writes:
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        require_free_disk(self.folder, size)
        begin = self.clock()
        super().save(progress, tensors)
        self.saving = Saving(self.clock() - begin, size)


@dataclass
class _Rehearsal(Trainer):
    """A trainer that never comes to the end of its stage, and whose clock is a stopwatch.

    Attributes:
        part: what is rehearsed.
        watch: its clock.
        recomputed: by stage, the layers that are computed again; decided once, for the stage as it is.
    """

    part: Part
    watch: Stopwatch
    recomputed: dict[str, tuple[int, ...]]
    _stage_step: int = field(init=False, default=0)

    def _step(self, stage: Stage, stage_step: int, *args: Any) -> Any:
        self._stage_step = stage_step
        self.watch.begin(_kind(stage, stage_step))
        return super()._step(stage, stage_step, *args)

    def _measures(self, stage: Stage, stage_step: int) -> bool:
        return _kind(stage, stage_step).measures

    def _schedule_mixers(self, progress: float, sequence_tokens: int) -> None:
        wobble = _WOBBLE * (self._stage_step % 2) if self.part.ramping else 0.0
        super()._schedule_mixers(abs(self.part.ramp - wobble), sequence_tokens)

    def _set_gradient_checkpointing(self, stage: Stage) -> None:
        model, whole = self.student.model, self.part.stage
        if whole.name not in self.recomputed:
            super()._set_gradient_checkpointing(whole)
            self.recomputed[whole.name] = recomputed_layers(model)
        checkpointed(model, self.recomputed[whole.name])


def _period(stage: Stage) -> int:
    """Steps after which every kind of step has come: new and used micro-batches, with and without measuring."""
    if stage.kind == "align":
        return {1: 2, 2: 4}.get(stage.passes, stage.passes)
    # Where measuring asks for a KL that is not learnt, recording begins anew after it: as seldom as in a run.
    return 2 if stage.objective.kl else MEASURE_EVERY_STEPS


def _kind(stage: Stage, stage_step: int) -> Kind:
    """Of a rehearsed step: in every period one measures, besides the first of all."""
    fresh = stage.kind != "align" or stage_step % stage.passes == 0
    return Kind(fresh, stage_step == 0 or stage_step % _period(stage) == _period(stage) - 1)


class Rehearser:
    """Rehearses the parts of a run with one student and teacher, which it leaves useless.

    Args:
        distill, data: of the recipe.
        sequences: where the tokens come from.
        folder: a checkpoint of each kind is written there once; on the disk of the run.
        clock: seconds.
    """

    def __init__(
        self,
        distill: Distill,
        data: Data,
        pair: tuple[Student, Teacher],
        sequences: PackedSequences,
        processes: Processes,
        *,
        mixed: bool,
        seed: int,
        folder: Path,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.distill, self.data, self.sequences, self.processes = distill, data, sequences, processes
        self.student, self.teacher = pair
        self.mixed, self.seed, self.folder, self.clock = mixed, seed, folder, clock
        self.meter = meter_of(processes.device)
        self.settling = _SETTLING_STEPS.get(processes.device.type, 1)
        self.savings: dict[str, Saving] = {}
        """A checkpoint within a stage, by the stage's kind."""
        self.spent_s = 0.0
        """On steps, but for the first of each attempt: kernels are compiled however much time there is."""
        self._recomputed: dict[str, tuple[int, ...]] = {}

    def rehearse(self, part: Part, limit_s: float) -> Rehearsed:
        """Runs steps of a part: in its own size, if that fits into memory and the time, or else in a smaller one.

        Raises:
            ResourceError: not even the shortest sequence fits, or the disk has no room for a checkpoint.
        """
        limit_s += self.spent_s
        sizes = ladder(part.shape, part.stage.accumulate)
        once = replace(part, stage=replace(part.stage, passes=1))
        at, top = 0, len(sizes) - 1
        too_large: Shape | None = None
        peaks: list[tuple[int, float]] = []
        scouting = top > 0
        while True:
            size = sizes[at]
            found = (
                self._attempt(once, size, {Kind(fresh=True, measures=False)}, 0.0)
                if scouting
                else self._attempt(part, size, self._kinds(part.stage), limit_s - self.spent_s, writes=True)
            )
            if found is None:
                too_large = size.shape
                top = at = _next_smaller(sizes, at, part)
                scouting = False
            elif not scouting:
                return replace(found, too_large=too_large, fixed_bytes=_fixed_bytes(found, peaks))
            else:
                peaks.append((size.shape.sequences * size.shape.tokens, found.peak_bytes))
                # By the fastest step: what else the machine has to do may pass, and a size too small misleads more.
                token_s = min(map(min, found.seconds.values())) / size.tokens
                left_s = (limit_s - self.spent_s) / (_period(part.stage) + 1)
                within = [index for index in range(at, top + 1) if token_s * sizes[index].tokens <= left_s]
                higher = max(within, default=at)
                scouting = at < higher < top
                at = higher

    def _attempt(
        self, part: Part, size: Size, wanted: set[Kind], limit_s: float, *, writes: bool = False
    ) -> Rehearsed | None:
        """Steps of this size; None if there is no memory for them."""
        try:
            return self._run(part, size, wanted, limit_s, writes=writes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self._clear()
        return None

    def _run(self, part: Part, size: Size, wanted: set[Kind], limit_s: float, *, writes: bool) -> Rehearsed:
        watch = Stopwatch(wanted, limit_s, self.clock, self.settling)
        state = _TimedState(self.folder, self.meter, self.clock)
        state.writes = writes and part.stage.kind not in self.savings
        stage = replace(
            part.stage,
            steps=_UNREACHED_STEPS,
            batch_sequences=size.shape.sequences,
            sequence_tokens=size.shape.tokens,
            accumulate=size.accumulate,
            curriculum=None,
            warmup_steps=0,
            learning_rate=_STILL,
            projection_learning_rate=None,
        )
        distill = replace(self.distill, stages=(stage,), save_every_steps=_UNREACHED_STEPS, teacher_cache=None)
        self.meter.reset()
        rehearsal = _Rehearsal(
            distill,
            self.data,
            self.student,
            self.teacher,
            self.sequences,
            state,
            _NoMetrics(),
            self.processes,
            self.mixed,
            watch,
            watch.stop,
            self.seed,
            part=part,
            watch=watch,
            recomputed=self._recomputed,
        )
        with suppress(StoppedError):
            rehearsal.train(None)
        self.spent_s += sum(map(sum, watch.seconds.values()))
        if state.saving is not None:
            self.savings[part.stage.kind] = state.saving
        on_gpu = isinstance(self.meter, GpuMeter)
        return Rehearsed(
            shape=size.shape,
            accumulate=size.accumulate,
            seconds=watch.seconds,
            first_steps_seconds=max(watch.first_s - self.settling * _slowest(watch.seconds), 0.0),
            peak_bytes=max(self.meter.peak_bytes(), state.held_bytes),
            fixed_bytes=state.held_bytes,
            reserved_bytes=torch.cuda.max_memory_reserved(self.processes.device) if on_gpu else 0.0,
        )

    def _kinds(self, stage: Stage) -> set[Kind]:
        """Those that come once the first steps are over."""
        return {_kind(stage, self.settling + step) for step in range(_period(stage))}

    def _clear(self) -> None:
        """Drops what a step that broke off has left: graphs hang on auxiliary losses and gradients."""
        for parameter in self.student.trained().values():
            parameter.grad = None
        for _, mixer in self.student.mixers:
            mixer.auxiliary = {}
            mixer.take_observations()
        gc.collect()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()


def _next_smaller(sizes: list[Size], at: int, part: Part) -> int:
    """The largest size with a smaller micro-batch than that at `at`, which found no memory."""
    taken = sizes[at].shape.sequences * sizes[at].shape.tokens
    smaller = [i for i, size in enumerate(sizes) if size.shape.sequences * size.shape.tokens < taken]
    if not smaller:
        shape = sizes[at].shape
        what = f"Not even {shape.sequences} x {shape.tokens} tokens fit into memory."
        hint = "Set distill.gradient_checkpointing: true, a smaller lora.rank, or take a device with more memory."
        raise ResourceError(what, where=f"stage {part.stage.name}", hint=hint)
    return max(smaller)


def _fixed_bytes(found: Rehearsed, peaks: Sequence[tuple[int, float]]) -> float:
    """By a line through the smallest micro-batch and this one; what is held between steps, if there is no other.

    A CPU's allocator keeps what is free: there, what is held between two steps says little.
    """
    tokens = found.shape.sequences * found.shape.tokens
    smaller = [point for point in peaks if point[0] < tokens and point[1] < found.peak_bytes]
    return max(Line.through([min(smaller), (tokens, found.peak_bytes)]).at(0), 0.0) if smaller else found.fixed_bytes


def _slowest(seconds: Mapping[Kind, Sequence[float]]) -> float:
    """Median seconds of the slowest kind of step."""
    return max((statistics.median(of_kind) for of_kind in seconds.values()), default=0.0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
