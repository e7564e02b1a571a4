"""Gradient checkpointing by need: as many decoder layers are computed again in the backward pass as memory demands.

Nothing is guessed: before a stage begins, short micro-batches go forward and backward, and the memory that they take
gives a line over their tokens; where the stage's own micro-batch would not fit, a second line, with every layer
computed again, tells what a layer saves. Weights, gradients, random states and controllers are left as they were.

Processes whose weights are sharded go through every pass together: one that ran out of memory would leave the others
waiting. So they grow their micro-batches only as far as the line through the smaller ones says that these fit, and what
they have room for first is weights that stay gathered from the forward to the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hybridize.distillation.data import Batch
from hybridize.distillation.lora import Student
from hybridize.distillation.memory import GpuMeter, Meter
from hybridize.distillation.processes import Processes
from hybridize.distillation.schedule import Shape, batch_shape
from hybridize.distillation.sharding import Sharding, gathered_bytes, keep_gathered, own_part
from hybridize.distillation.stages import Step
from hybridize.model.training_form import checkpointed
from hybridize.progress import Reporter
from hybridize.recipe.schema import Data, Stage

PROBE_TOKENS = 1024
"""Of the shorter probe; the longer one has twice as many.

Both fill a chunk of the loss's logits if the vocabulary is as large as those of real models. If it has less than some
24 thousand words the chunk still grows from one to the other, and the line foresees too much, never too little.
"""
SMALLEST_PROBE_TOKENS = 256
"""Of the first probe of processes that are sharded; it has to fit."""
MARGIN = 0.08
"""Share of the memory that stays free: for what fragments, and for what a step holds beside a micro-batch."""
_DOCUMENT_TOKENS = 512
_ADAM_BYTES = 4 + 4


@dataclass(frozen=True)
class Line:
    """Bytes of a micro-batch as a line over its tokens."""

    fixed_bytes: float
    bytes_per_token: float

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> Line:
        """The line through (tokens, bytes) of two micro-batches; what one alone takes is taken by every other."""
        (first, low), (last, high) = points[0], points[-1]
        slope = max(high - low, 0.0) / (last - first) if last > first and math.isfinite(high) else 0.0
        return cls(high - slope * last, slope)

    def at(self, tokens: int) -> float:
        return self.fixed_bytes + self.bytes_per_token * tokens


@dataclass(frozen=True)
class Decision:
    """How many of a model's layers are computed again, and why.

    Attributes:
        layers: their indices.
        need_bytes: of a step in which none is. capacity_bytes: what a step may take, the margin left out.
        fits: whether the step fits this way, as far as was measured.
        keeps_gathered: whether there is room for sharded weights to stay gathered until the backward pass.
    """

    layers: tuple[int, ...]
    need_bytes: float
    capacity_bytes: float
    fits: bool
    keeps_gathered: bool = False

    def sentence(self, stage: Stage, num_layers: int) -> str:
        """For people."""
        need = f"{self.need_bytes / 2**30:,.1f} GiB" if math.isfinite(self.need_bytes) else "more than there is"
        text = f"{stage.name}: a step needs {need} of {self.capacity_bytes / 2**30:,.1f} GiB; "
        if not self.layers:
            gathered = ", and weights stay gathered until the backward pass." if self.keeps_gathered else "."
            return text + "no layer is computed again" + gathered
        text += f"{len(self.layers)} of {num_layers} layers are computed again in the backward pass"
        return text + ("." if self.fits else ", and even so it may not fit: fewer batch_sequences, more accumulate.")


def layers_needed(without: float, with_all: float, capacity: float, num_layers: int) -> int:
    """The smallest number of layers, computed again, with which a step fits; all of them if it does not even then.

    Args:
        without, with_all: bytes of a step with no layer, and with every layer, computed again; each saves alike.
        capacity: bytes that a step may take.
    """
    if without <= capacity:
        return 0
    saved = (without - with_all) / num_layers
    if with_all > capacity or not math.isfinite(saved) or saved <= 0:
        return num_layers
    return min(math.ceil((without - capacity) / saved), num_layers)


def spread(count: int, num_layers: int) -> tuple[int, ...]:
    """`count` layers, evenly over the depth.

    The last one is the last to be chosen: when a layer is computed again, those above it are gone already, and what
    they have held is room for it.
    """
    return tuple(number * num_layers // count for number in range(count))


def probe_shapes(largest: Shape) -> tuple[Shape, ...]:
    """Two short micro-batches whose bytes give a line, or the largest one itself where it is hardly longer."""
    tokens = min(largest.tokens, PROBE_TOKENS)
    if largest.sequences * largest.tokens <= 2 * tokens:
        return (largest,)
    return Shape(1, tokens), Shape(1, 2 * tokens) if largest.tokens >= 2 * tokens else Shape(2, tokens)


def growing_shapes(largest: Shape) -> tuple[Shape, ...]:
    """Micro-batches from a very short one to those of `probe_shapes`, each about twice as large as the one before."""
    total, tokens = _tokens(largest), SMALLEST_PROBE_TOKENS
    shapes = []
    while tokens <= 2 * PROBE_TOKENS and tokens < total:
        shapes.append(Shape(max(tokens // largest.tokens, 1), min(tokens, largest.tokens)))
        tokens *= 2
    return (*shapes, largest) if total <= 2 * PROBE_TOKENS else tuple(shapes)


def largest_shape(stage: Stage, data: Data) -> Shape:
    """The stage's micro-batch with the most tokens, in the longest sequences."""
    shapes = {batch_shape(stage, data, step) for step in range(stage.steps)}
    return max(shapes, key=lambda shape: (_tokens(shape), shape.tokens))


class Probe:
    """Measures what micro-batches of a stage take.

    Args:
        step: of the stage, with its parameters unfrozen. Its teacher must not keep what it is asked.
        meter: of the device's memory.
        data: whether documents have bounds.
        sharding: of the weights; then all processes go through every pass together, and none may run out of memory.
    """

    def __init__(
        self,
        step: Step,
        student: Student,
        meter: Meter,
        data: Data,
        device: torch.device,
        sharding: Sharding | None = None,
    ) -> None:
        self.step, self.student, self.meter, self.data, self.device = step, student, meter, data, device
        self.sharding = sharding

    def decide(self, largest: Shape, agree: Callable[[int], int]) -> Decision:
        """Which layers have to be computed again for micro-batches of this shape.

        Args:
            agree: of a number of layers, what the processes settle on: the largest of theirs.
        """
        num_layers = self.student.model.config.num_hidden_layers
        capacity = self.meter.capacity_bytes() * (1 - MARGIN)

        def fits_all(number_of_bytes: float) -> bool:
            return agree(int(number_of_bytes > capacity)) == 0  # all processes go on in the same way

        optimizer_bytes = _ADAM_BYTES * sum(own_part(p).numel() for group in self.step.clip_groups() for p in group)
        tokens = _tokens(largest)
        without = self._line(largest, (), fits_all).at(tokens) + optimizer_bytes
        if fits_all(without):
            keeps_gathered = self.sharding is not None and (
                not self.sharding.reshard_after_forward or fits_all(without + gathered_bytes(self.student.model))
            )
            return Decision((), without, capacity, fits=True, keeps_gathered=keeps_gathered)
        with_all = self._line(largest, range(num_layers), fits_all).at(tokens) + optimizer_bytes
        count = agree(layers_needed(without, with_all, capacity, num_layers))
        fits = count < num_layers or with_all <= capacity
        return Decision(spread(count, num_layers), without, capacity, fits)

    def _line(self, largest: Shape, recomputed: Sequence[int], fits_all: Callable[[float], bool]) -> Line:
        checkpointed(self.student.model, recomputed)
        if self.sharding is None:
            return Line.through([(_tokens(shape), self._bytes(shape)) for shape in probe_shapes(largest)])
        points: list[tuple[int, float]] = []
        for shape in growing_shapes(largest):
            if len(points) > 1 and not fits_all(Line.through(points[-2:]).at(_tokens(shape))):
                break
            points.append((_tokens(shape), self._bytes(shape)))
        return Line.through(points[-2:])

    def _bytes(self, shape: Shape) -> float:
        """The peak of the second of two micro-batches: it meets the first one's gradients, and kernels at work."""
        peak = math.inf
        with untouched(self.student, self.device):
            try:
                batch = probe_batch(shape, self.data, self.student.model.config.vocab_size).to(self.device)
                for _ in range(2):
                    self.meter.reset()
                    self.step.backward(self.step.prepare(batch), 0.5, measure=True)
                peak = self.meter.peak_bytes()
            except torch.OutOfMemoryError:
                if self.sharding is not None:
                    raise
                # Else it is the answer.
        return peak


def probe_batch(shape: Shape, data: Data, vocabulary: int) -> Batch:
    """A micro-batch without a text, made without chance; its documents are a few hundred tokens long."""
    count = shape.sequences * shape.tokens
    tokens = (torch.arange(count) * 7919 % vocabulary).view(shape.sequences, shape.tokens)
    length = min(_DOCUMENT_TOKENS, max(shape.tokens // 2, 1))
    bounds = {row * shape.tokens + place for row in range(shape.sequences) for place in range(0, shape.tokens, length)}
    return Batch(
        tokens,
        documents=(),
        bounds=torch.tensor([*sorted(bounds), count], dtype=torch.int32) if data.document_boundaries else None,
    )


@contextmanager
def untouched(student: Student, device: torch.device) -> Iterator[None]:
    """Puts back, after the block, what passes forward and backward leave in a student and in torch.

    That is gradients, the states of the random generators, what the controllers have seen, and auxiliary losses.
    """
    parameters = list(student.trained().values())
    gradients = [parameter.grad for parameter in parameters]
    auxiliary = [mixer.auxiliary for _, mixer in student.mixers]
    observed = [mixer.take_observations() for _, mixer in student.mixers]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for (_, mixer), losses, observations in zip(student.mixers, auxiliary, observed, strict=True):
            mixer.auxiliary = losses
            mixer.take_observations()
            mixer.give_observations(observations)


@contextmanager
def observed_once(student: Student) -> Iterator[None]:
    """Around a micro-batch: what a controller sees again when its layer is computed again does not count.

    A mean over everything twice would be the same number, but for its last bit.
    """
    before = [mixer.take_observations() for _, mixer in student.mixers]
    yield
    for (_, mixer), observations in zip(student.mixers, before, strict=True):
        mixer.give_observations([*observations, *mixer.take_observations()[:1]])


def recompute_by_need(
    stage: Stage, data: Data, student: Student, step: Step, processes: Processes, reporter: Reporter
) -> None:
    """Computes as many layers again in a stage as its largest micro-batch needs to fit, the same in all processes.

    Where weights are sharded and memory is left, they stay gathered from the forward to the backward pass.

    Args:
        step: as for `Probe`.
        reporter: is told what was decided; of the processes, only the first one says it.
    """
    if processes.device.type != "cuda":  # a CPU's memory has swap behind it and others in it: no step has to fit
        checkpointed(student.model, ())
        return
    meter = GpuMeter(processes.device)
    num_layers = student.model.config.num_hidden_layers
    sharding = processes.sharding
    if sharding is not None:
        keep_gathered(student.model, not sharding.reshard_after_forward)

    def agree(number: int) -> int:
        votes = torch.zeros(num_layers + 1, device=processes.device)
        votes[number] = 1
        return int(processes.sum(votes).nonzero().max())

    probe = Probe(step, student, meter, data, processes.device, sharding)
    decision = probe.decide(largest_shape(stage, data), agree)
    checkpointed(student.model, decision.layers)
    if decision.keeps_gathered:
        keep_gathered(student.model, True)
    if processes.is_first:
        reporter.note(decision.sentence(stage, num_layers))


def _tokens(shape: Shape) -> int:
    return shape.sequences * shape.tokens
