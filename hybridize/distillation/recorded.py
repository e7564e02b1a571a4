"""A micro-batch recorded once and replayed: its forward and backward pass as a CUDA graph.

A small model's kernels are done before the host has queued the next ones: a step of SmolLM2-135M is some six thousand
launches. Recorded, it is one. Whatever a step takes from the host is part of the record: shapes, the eviction budget,
the share of a micro-batch in its step. Micro-batches that are new in this are queued as ever, and recorded once they
have repeated; a few records are kept, in one memory. Kernels and their order are the same either way, and so are the
numbers.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.distillation.data import Batch
from hybridize.distillation.lora import Group, Student
from hybridize.distillation.losses import Target
from hybridize.distillation.sharding import is_sharded
from hybridize.distillation.stages import Distil, Measured
from hybridize.distillation.teacher import Teacher
from hybridize.distillation.top_k import TopK
from hybridize.model.training_form import recomputed_layers

MOST_OPERATIONS = 2e14
"""Of a micro-batch, forward and backward: beyond about half a second of them a GPU never waits for the host."""
QUEUED_FIRST = 3
"""Micro-batches of a kind that are queued: to record one takes as long as queueing two."""
MOST_RECORDS = 4
BOUNDS_STEP = 32
"""Documents are counted up to a multiple of this, the last ones empty, so that most batches of a stage are alike."""


@dataclass(frozen=True)
class Record:
    """A graph, what it reads, and what it leaves.

    Attributes:
        inputs: copied to before a replay. measured: what the step returned.
        gradients: of the parameters that got one; a replay overwrites them.
        observed: by mixer, what its controller was told.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    measured: Measured
    gradients: tuple[tuple[nn.Parameter, Tensor], ...]
    observed: tuple[tuple[Any, tuple[Any, ...]], ...]


@dataclass
class _Left:
    """Whether what a micro-batch has left stays."""

    stays: bool = False


class RecordedDistil:
    """A `Distil` whose micro-batches are replayed where they repeat.

    Args:
        step: what is recorded.
        note: is told, once, why nothing can be recorded.
    """

    def __init__(self, step: Distil, note: Callable[[str], None]) -> None:
        self.step, self.note = step, note
        self.groups: tuple[Group, ...] = step.groups
        self._schedule: tuple[Hashable, ...] = ()
        self._counts: Counter[Hashable] = Counter()
        self._records: OrderedDict[Hashable, Record] = OrderedDict()
        self._given_up = False

    def clip_groups(self) -> list[list[nn.Parameter]]:
        return self.step.clip_groups()

    def prepare(self, batch: Batch) -> tuple[Batch, Target | None]:
        """A live teacher is asked in `backward`, as part of the record; what a cache says is fetched here."""
        if isinstance(self.step.teacher, Teacher):
            return batch, None
        return self.step.prepare(batch)

    def backward(self, prepared: tuple[Batch, Target | None], share: float, *, measure: bool) -> Measured:
        batch, target = prepared
        batch = replace(batch, bounds=padded_bounds(batch.bounds))
        self._follow_schedule()
        key = (share, measure and not self.step.stage.objective.kl, *map(_kind, _tensors(batch, target)))
        self._counts[key] += 1
        if self._given_up or self._counts[key] <= QUEUED_FIRST:
            return self._queue(batch, target, share, measure)
        if self._counts[key] == QUEUED_FIRST + 1:
            return self._tried(batch, target, share, measure)
        if key not in self._records:
            self._make_room()
            self._records[key] = self._recorded(batch, target, share, measure)
        self._records.move_to_end(key)
        return self._replayed(self._records[key], _tensors(batch, target))

    def _follow_schedule(self) -> None:
        """Forgets what was recorded under another schedule: it does not come back."""
        schedule = tuple(mixer.schedule_key() for _, mixer in self.step.student.mixers)
        if schedule != self._schedule:
            self._schedule = schedule
            self._counts.clear()
            self._records.clear()

    def _make_room(self) -> None:
        """Forgets the record that was not replayed for longest, where there are many."""
        if len(self._records) >= MOST_RECORDS:
            oldest, _ = self._records.popitem(last=False)
            self._counts[oldest] = 0

    def _queue(self, batch: Batch, target: Target | None, share: float, measure: bool) -> Measured:
        """A micro-batch as ever."""
        prepared = self.step.prepare(batch) if target is None else (batch, target)
        return self.step.backward(prepared, share, measure=measure)

    def _tried(self, batch: Batch, target: Target | None, share: float, measure: bool) -> Measured:
        """The same, but whatever lets the host wait for the GPU is an error: it would spoil a record beyond repair."""
        mode = torch.cuda.get_sync_debug_mode()
        try:
            with self._put_back() as left, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)  # it may miss some waits
                torch.cuda.set_sync_debug_mode("error")
                measured = self._queue(batch, target, share, measure)
                left.stays = True
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._given_up = True
            reason = str(error).splitlines()[0]
            self.note(f"Steps are queued launch by launch: they cannot be recorded ({reason}).")
        else:
            return measured
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return self._queue(batch, target, share, measure)

    def _recorded(self, batch: Batch, target: Target | None, share: float, measure: bool) -> Record:
        """Records a micro-batch without running it."""
        inputs = tuple(tensor.clone() for tensor in _tensors(batch, target))
        graph = torch.cuda.CUDAGraph()
        with self._put_back():
            for parameter in self._parameters:
                parameter.grad = None
            for _, mixer in self.step.student.mixers:
                mixer.take_observations()
            _release()
            # Records are replayed one after the other, and what one leaves is used before the next: they share memory.
            pool = next((record.graph.pool() for record in self._records.values()), None)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                measured = self._queue(*_restored(batch, target, inputs), share, measure)
            gradients = tuple((p, p.grad) for p in self._parameters if p.grad is not None)
            mixers = [mixer for _, mixer in self.step.student.mixers]
            observed = tuple((mixer, tuple(mixer.take_observations())) for mixer in mixers)
        return Record(graph, inputs, measured, gradients, observed)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return list(self.step.student.trained().values())

    @contextmanager
    def _put_back(self) -> Iterator[_Left]:
        """Puts back what a micro-batch adds to: gradients, and what controllers have seen; unless it `stays`."""
        left = _Left()
        mixers = [mixer for _, mixer in self.step.student.mixers]
        gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        observed = [mixer.take_observations() for mixer in mixers]
        for mixer, observations in zip(mixers, observed, strict=True):
            mixer.give_observations(observations)
        try:
            yield left
        finally:
            if not left.stays:
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    parameter.grad = gradient
                for mixer, observations in zip(mixers, observed, strict=True):
                    mixer.take_observations()
                    mixer.give_observations(observations)

    def _replayed(self, record: Record, inputs: Sequence[Tensor]) -> Measured:
        for static, tensor in zip(record.inputs, inputs, strict=True):
            static.copy_(tensor, non_blocking=True)
        parameters, gradients = [p for p, _ in record.gradients], [gradient for _, gradient in record.gradients]
        # A second micro-batch of a step overwrites what the first one left in the same place.
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        record.graph.replay()
        held = [(gradient, old) for gradient, old in zip(gradients, before, strict=True) if old is not None]
        if held:
            torch._foreach_add_([gradient for gradient, _ in held], [old for _, old in held])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for mixer, observations in record.observed:
            mixer.give_observations([type(o)(*map(_copied, o)) for o in observations])
        return {name: value.clone() for name, value in record.measured.items()}


def recorded(step: Any, student: Student, tokens: int, device: torch.device, note: Callable[[str], None]) -> Any:
    """The step, recorded where that can be done and pays: on a GPU, with kernels that do not outlast their queueing.

    Args:
        tokens: of a micro-batch.
    """
    sharded = any(map(is_sharded, student.trained().values()))
    operations = 6 * tokens * sum(parameter.numel() for parameter in student.model.parameters())
    can_be = isinstance(step, Distil) and device.type == "cuda" and not sharded and not recomputed_layers(student.model)
    if not can_be or operations > MOST_OPERATIONS:
        return step
    alike = all(mixer.schedule_key() is not None for _, mixer in student.mixers)
    return RecordedDistil(step, note) if alike else step


def padded_bounds(bounds: Tensor | None) -> Tensor | None:
    """Bounds [N + 1] of documents, with empty documents at the end up to a multiple of BOUNDS_STEP."""
    if bounds is None or (missing := -(len(bounds) - 1) % BOUNDS_STEP) == 0:
        return bounds
    return torch.cat((bounds, bounds[-1:].expand(missing)))


def _tensors(batch: Batch, target: Target | None) -> tuple[Tensor, ...]:
    """What a micro-batch is made of."""
    bounds = () if batch.bounds is None else (batch.bounds,)
    return (batch.tokens, *bounds, *((target.ids, target.log_probs) if isinstance(target, TopK) else ()))


def _restored(batch: Batch, target: Target | None, tensors: tuple[Tensor, ...]) -> tuple[Batch, Target | None]:
    """The inverse of `_tensors`."""
    tokens, *others = tensors
    bounds = None if batch.bounds is None else others.pop(0)
    return replace(batch, tokens=tokens, bounds=bounds), TopK(*others) if isinstance(target, TopK) else target


def _kind(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _release() -> None:
    """Gives memory that nobody holds back to the GPU, so that a record's own has room."""
    gc.collect()
    torch.cuda.empty_cache()
