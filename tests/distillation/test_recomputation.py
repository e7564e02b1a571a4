"""Gradient checkpointing by need: the choice by numbers, a probe without a trace, gradients that stay equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.distillation import recomputation
from hybridize.distillation.data import Batch
from hybridize.distillation.lora import Student, wrap
from hybridize.distillation.memory import GpuMeter
from hybridize.distillation.recomputation import (
    MARGIN,
    Decision,
    Line,
    Probe,
    growing_shapes,
    largest_shape,
    layers_needed,
    observed_once,
    probe_batch,
    probe_shapes,
    spread,
)
from hybridize.distillation.run import prepare_pair
from hybridize.distillation.schedule import Shape
from hybridize.distillation.sharding import Sharding
from hybridize.distillation.stages import Step, make_step
from hybridize.distillation.teacher import Teacher
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from hybridize.model.training_form import checkpointed, recomputed_layers
from hybridize.recipe.schema import Curriculum, Data, Lora, Stage
from hybridize.recipe.sources import TextSource
from tests.tiny import tiny_teacher

DATA = Data(train=(TextSource("*.txt"),), sequence_tokens=64)
STAGE = Stage("distill", "distill", steps=8, batch_sequences=3)
EVICTION = {"mixer": "token_eviction", "window_tokens": 14, "sink_tokens": 2, "budget_tokens": 8}
SHARDED = Sharding("cpu")
LAYERS = ({"mixer": "full_attention"}, EVICTION, {"mixer": "gated_delta_net"}, EVICTION)
CPU = torch.device("cpu")


def pair(device: torch.device = CPU, **changes: Any) -> tuple[Student, Step]:
    """A student of four layers with dropout in scorers and adapters, in training, and the step of a distill stage."""
    model = swap(tiny_teacher(**changes), [config_from_dict(dict(layer)) for layer in LAYERS])
    student = wrap(model, Lora(rank=2, dropout=0.1), frozen_dtype=torch.float32)
    teacher = Teacher(tiny_teacher(**changes))
    prepare_pair(student, teacher, share=True, device=device)
    step = make_step(STAGE, student, teacher, nullcontext())  # type: ignore[arg-type]
    student.model.train()
    return student, step


@dataclass
class FakeMeter:
    """Memory by arithmetic: a token holds `layer_bytes` in every layer that is kept, `input_bytes` in the others."""

    student: Student
    capacity: float
    fixed_bytes: float = 1000.0
    layer_bytes: float = 10.0
    input_bytes: float = 2.0
    fails_above_bytes: float = math.inf
    tokens: int = 0
    seen: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.student.model.model.register_forward_pre_hook(self._hear, with_kwargs=True)

    def _hear(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens = kwargs["input_ids"].numel()
        if self._bytes() > self.fails_above_bytes:
            raise torch.OutOfMemoryError("out of memory")

    def _bytes(self) -> float:
        count = len(recomputed_layers(self.student.model))
        return self.fixed_bytes + self.tokens * (self.layer_bytes * (4 - count) + self.input_bytes * count)

    def capacity_bytes(self) -> float:
        return self.capacity / (1 - MARGIN)

    def reset(self) -> None:
        self.tokens = 0

    def held_bytes(self) -> float:
        return self.fixed_bytes

    def peak_bytes(self) -> float:
        self.seen.append((self.tokens, len(recomputed_layers(self.student.model))))
        return self._bytes()


def decide(meter: FakeMeter, step: Step, largest: Shape, sharding: Sharding | None = None) -> Decision:
    return Probe(step, meter.student, meter, DATA, CPU, sharding).decide(largest, lambda number: number)


# The choice.


@pytest.mark.parametrize(
    ("without", "with_all", "capacity", "count"),
    [
        (100, 20, 100, 0),
        (100, 20, 99, 1),
        (100, 20, 90, 1),
        (100, 20, 89, 2),
        (100, 20, 20, 8),
        (100, 20, 10, 8),  # does not fit at all: then by everything there is
        (math.inf, 20, 50, 8),  # nothing to measure the layers by
        (math.inf, math.inf, 50, 8),
        (100, 100, 50, 8),
    ],
)
def test_no_more_layers_than_needed(without: float, with_all: float, capacity: float, count: int) -> None:
    assert layers_needed(without, with_all, capacity, 8) == count


@pytest.mark.parametrize("num_layers", [1, 2, 7, 30])
def test_layers_are_spread_evenly_and_the_last_one_comes_last(num_layers: int) -> None:
    assert spread(0, num_layers) == ()
    assert spread(num_layers, num_layers) == tuple(range(num_layers))
    for count in range(1, num_layers):
        chosen = spread(count, num_layers)
        gaps = {after - before for before, after in zip(chosen, (*chosen[1:], num_layers), strict=True)}
        assert len(chosen) == len(set(chosen)) == count
        assert max(gaps) - min(gaps) <= 1
        assert num_layers - 1 not in chosen


def test_line_goes_through_both_points() -> None:
    line = Line.through([(1024, 5000.0), (2048, 7048.0)])
    assert (line.at(1024), line.at(2048), line.at(8192)) == (5000, 7048, 5000 + 7 * 2048)
    assert Line.through([(64, 300.0)]).at(64) == 300
    assert Line.through([(1024, 5000.0), (2048, math.inf)]).at(4096) == math.inf
    assert Line.through([(1024, 5000.0), (2048, 4000.0)]).at(4096) >= 4000  # noise: never less than was seen


@pytest.mark.parametrize(
    ("largest", "probes"),
    [
        (Shape(1, 8192), (Shape(1, 1024), Shape(1, 2048))),
        (Shape(8, 1024), (Shape(1, 1024), Shape(2, 1024))),
        (Shape(4, 1500), (Shape(1, 1024), Shape(2, 1024))),
        (Shape(1, 1500), (Shape(1, 1500),)),
        (Shape(2, 64), (Shape(2, 64),)),
    ],
)
def test_probes_are_short(largest: Shape, probes: Sequence[Shape]) -> None:
    assert probe_shapes(largest) == probes


@pytest.mark.parametrize(
    ("largest", "tokens"),
    [
        (Shape(1, 8192), [256, 512, 1024, 2048]),
        (Shape(16, 256), [256, 512, 1024, 2048]),
        (Shape(4, 300), [256, 300, 900, 1200]),
        (Shape(6, 64), [256, 384]),
        (Shape(1, 64), [64]),
    ],
)
def test_growing_probes_are_short_and_begin_very_short(largest: Shape, tokens: Sequence[int]) -> None:
    shapes = growing_shapes(largest)
    assert [shape.sequences * shape.tokens for shape in shapes] == tokens
    assert all(shape.tokens <= largest.tokens for shape in shapes)


def test_largest_micro_batch_of_a_curriculum_has_the_longest_sequences() -> None:
    stage = Stage("s", "distill", steps=8, batch_sequences=2, curriculum=Curriculum(start_tokens=16, end=0.5))
    assert largest_shape(stage, DATA) == Shape(2, 64)


@pytest.mark.parametrize("bounded", [True, False])
def test_probe_batch_is_a_batch(bounded: bool) -> None:
    data = Data(train=DATA.train, document_boundaries=bounded)
    batch = probe_batch(Shape(2, 1100), data, 96)
    assert batch.tokens.shape == (2, 1100)
    assert set(batch.tokens.unique().tolist()) == set(range(96))
    if bounded:
        assert batch.bounds is not None
        assert batch.bounds.tolist() == [0, 512, 1024, 1100, 1612, 2124, 2200]
    else:
        assert batch.bounds is None


@pytest.mark.parametrize(("kept_layers", "count"), [(4.0, 0), (3.5, 1), (1.9, 3), (0.9, 4), (0.1, 4)])
def test_decision_makes_the_stage_fit(kept_layers: float, count: int) -> None:
    student, step = pair()
    optimizer = 8 * sum(p.numel() for p in student.trained().values())
    tokens = 6 * 64
    meter = FakeMeter(student, capacity=1000 + optimizer + tokens * (4 * 2 + kept_layers * 8))
    decision = decide(meter, step, Shape(6, 64))
    assert decision.layers == spread(count, 4)
    assert decision.need_bytes == pytest.approx(1000 + optimizer + tokens * 40)
    assert decision.fits == (kept_layers >= 0)
    # The stage's own micro-batch was not tried; all layers were recomputed only where they had to be.
    assert [tokens for tokens, _ in meter.seen] == [64, 128] * (1 if count == 0 else 2)
    assert {recomputed for _, recomputed in meter.seen} == ({0} if count == 0 else {0, 4})


def test_what_fits_in_no_way_is_said() -> None:
    student, step = pair()
    decision = decide(FakeMeter(student, capacity=1500), step, Shape(6, 64))
    assert (decision.layers, decision.fits) == ((0, 1, 2, 3), False)
    assert "4 of 4 layers" in decision.sentence(STAGE, 4)
    assert "fewer batch_sequences" in decision.sentence(STAGE, 4)


def test_out_of_memory_in_the_probe_is_an_answer() -> None:
    student, step = pair()
    meter = FakeMeter(student, capacity=1e9, fails_above_bytes=1000 + 128 * 30)
    decision = decide(meter, step, Shape(6, 64))
    assert (decision.layers, decision.fits) == ((0, 1, 2, 3), True)
    assert "more than there is" in decision.sentence(STAGE, 4)


def test_one_process_that_needs_it_decides_for_all() -> None:
    student, step = pair()
    answers = iter((1, 3))
    meter = FakeMeter(student, capacity=1e9)
    decision = Probe(step, student, meter, DATA, CPU).decide(Shape(6, 64), lambda number: max(number, next(answers)))
    assert decision.layers == spread(3, 4)


# Processes whose weights are sharded: one that runs out of memory would leave the others waiting.


def test_what_is_not_foreseen_to_fit_is_not_tried() -> None:
    student, step = pair()
    capacity = 1000 + 40 * 700.0
    meter = FakeMeter(student, capacity, fails_above_bytes=capacity)
    decision = decide(meter, step, Shape(40, 64), SHARDED)
    assert meter.seen == [(256, 0), (512, 0), (256, 4), (512, 4), (1024, 4), (2048, 4)]
    optimizer = 8 * sum(p.numel() for p in student.trained().values())
    assert decision.need_bytes == pytest.approx(1000 + 2560 * 40 + optimizer)
    with_all = 1000 + 2560 * 8 + optimizer
    assert len(decision.layers) == layers_needed(decision.need_bytes, with_all, capacity, 4)
    assert not decision.keeps_gathered


def test_a_smallest_probe_that_does_not_fit_ends_the_run() -> None:
    student, step = pair()
    with pytest.raises(torch.OutOfMemoryError):
        decide(FakeMeter(student, capacity=1e9, fails_above_bytes=2000), step, Shape(40, 64), SHARDED)


@pytest.mark.parametrize(("room", "kept"), [(5001.0, True), (4999.0, False)])
def test_gathered_weights_stay_where_there_is_room(monkeypatch: pytest.MonkeyPatch, room: float, kept: bool) -> None:
    monkeypatch.setattr(recomputation, "gathered_bytes", lambda model: 5000)
    student, step = pair()
    need = 1000 + 384 * 40 + 8 * sum(p.numel() for p in student.trained().values())
    decision = decide(FakeMeter(student, capacity=need + room), step, Shape(6, 64), SHARDED)
    assert (decision.layers, decision.keeps_gathered) == ((), kept)
    assert ("stay gathered" in decision.sentence(STAGE, 4)) == kept
    assert not decide(FakeMeter(student, capacity=need + room), step, Shape(6, 64)).keeps_gathered
    asked = Sharding("cpu", reshard_after_forward=False)  # by the launcher: they are kept anyway, and were measured so
    assert decide(FakeMeter(student, capacity=need + room), step, Shape(6, 64), asked).keeps_gathered


# Harmlessness.


def observations(student: Student) -> list[int]:
    """How many micro-batches each layer's controller has seen."""
    counts = []
    for _, mixer in student.mixers:
        seen = mixer.take_observations()
        mixer.give_observations(seen)
        counts.append(len(seen))
    return counts


def traces(student: Student) -> dict[str, Any]:
    """Everything that the probe could leave something in."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in student.peft.state_dict().items()},
        "gradients": {name: p.grad for name, p in student.trained().items()},
        "observed": observations(student),
        "auxiliary": [dict(mixer.auxiliary) for _, mixer in student.mixers],
        "training": [module.training for module in student.model.modules()],
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "with gradients and observations"])
def test_probe_leaves_no_trace(used: bool) -> None:
    student, step = pair()
    if used:
        step.backward(step.prepare(probe_batch(Shape(1, 64), DATA, 96)), 1.0, measure=False)
        assert any(p.grad is not None for p in student.trained().values())
    before = traces(student)
    decide(FakeMeter(student, capacity=2000), step, Shape(6, 64))
    after = traces(student)
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    assert all(after["gradients"][name] is gradient for name, gradient in before["gradients"].items())
    assert after["observed"] == before["observed"] == [int(used), 0, int(used)]
    for left, there in zip(after["auxiliary"], before["auxiliary"], strict=True):
        assert left.keys() == there.keys()
        assert all(left[name] is value for name, value in there.items())
    assert after["training"] == before["training"]
    assert torch.equal(before["random"], after["random"])


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2, 3)])
def test_recomputation_changes_no_bit(layers: tuple[int, ...]) -> None:
    """Two micro-batches with dropout: gradients, random states and what the controllers make of it."""
    batches = [probe_batch(Shape(2, 64), DATA, 96), Batch(torch.arange(128).view(2, 64) % 90, ())]
    found: list[dict[str, Tensor]] = []
    for chosen in ((), layers):
        student, step = pair()
        checkpointed(student.model, chosen)
        torch.manual_seed(3)
        for batch in batches:
            with observed_once(student):
                step.backward(step.prepare(batch), 0.5, measure=True)
        assert observations(student) == [2, 0, 2]
        for _, mixer in student.mixers:
            mixer.after_step()
        values = {name: p.grad.clone() for name, p in student.trained().items() if p.grad is not None}
        found.append(values | dict(student.buffers) | {"random": torch.get_rng_state()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.gpu
def test_decision_keeps_a_step_within_the_memory_of_a_gpu() -> None:
    device, vocabulary = torch.device("cuda"), 32768  # as in models; see PROBE_TOKENS
    student, step = pair(device, hidden_size=256, intermediate_size=1024, vocab_size=vocabulary)
    largest = Shape(16, 2048)

    class Small(GpuMeter):
        capacity = 0.0

        def capacity_bytes(self) -> float:
            return self.capacity

    def peak(layers: Sequence[int]) -> float:
        checkpointed(student.model, layers)
        meter.reset()
        batch = probe_batch(largest, DATA, vocabulary).to(device)
        for _ in range(2):
            step.backward(step.prepare(batch), 0.5, measure=True)
        for parameter in student.trained().values():
            parameter.grad = None
        return meter.peak_bytes()

    meter = Small(device)
    optimizer = 8 * sum(p.numel() for p in student.trained().values())
    without, with_all = peak(()), peak(range(4))
    meter.capacity = (without + with_all) / 2 / (1 - MARGIN) + optimizer
    decision = Probe(step, student, meter, DATA, device).decide(largest, lambda number: number)
    assert decision.need_bytes - optimizer == pytest.approx(without, rel=0.2)
    assert 0 < len(decision.layers) < 4
    assert peak(decision.layers) <= meter.capacity
