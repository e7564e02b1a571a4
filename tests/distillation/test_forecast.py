"""Forecasts: which steps a run has, by kind, and what they are scaled to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hybridize.distillation.calibration import forecast_stages
from hybridize.distillation.forecast import (
    Kind,
    Part,
    Rehearsed,
    Saving,
    forecast_part,
    parts_of,
    problem_of,
    saves_of,
    seconds_per_step,
)
from hybridize.distillation.schedule import Shape, ramp_progress
from hybridize.distillation.trainer import Trainer
from hybridize.recipe.schema import Curriculum, Data, Distill, Ramp, Stage
from hybridize.recipe.sources import TextSource

NEW, NEW_MEASURED, USED, USED_MEASURED = Kind(True, False), Kind(True, True), Kind(False, False), Kind(False, True)
DATA = Data(train=(TextSource("*.txt"),), sequence_tokens=64)


# Which steps there are.


def test_parts_are_all_steps_by_shape_and_kind() -> None:
    align = Stage("align", "align", steps=12, batch_sequences=2, passes=4)
    distill = Stage("distill", "distill", steps=16, batch_sequences=1, accumulate=3, curriculum=Curriculum(16, 0.5))
    first, *others = parts_of(Distill((align, distill)), DATA)
    assert (first.shape, first.step_tokens) == (Shape(2, 64), 128)
    # Steps 1, 10 and 12 measure; 1, 5 and 9 take new micro-batches.
    assert first.counts == {NEW_MEASURED: 1, NEW: 2, USED: 7, USED_MEASURED: 2}
    assert [(part.shape, part.steps) for part in others] == [(Shape(4, 16), 4), (Shape(2, 32), 4), (Shape(1, 64), 8)]
    assert {part.step_tokens for part in others} == {192}
    assert sum(part.counts.get(NEW_MEASURED, 0) for part in others) == 3  # steps 1, 8 and 16 of it: 13, 20, 28 in all


def test_parts_count_what_the_trainer_does() -> None:
    """By asking a trainer's own rule, at a log interval that does not divide the tens."""
    stages = (Stage("a", "align", steps=9, passes=2), Stage("b", "distill", steps=33))
    distill = Distill(stages, log_every_steps=3)
    trainer: Any = Trainer.__new__(Trainer)
    trainer.distill = distill
    steps = [(stage, step) for stage in stages for step in range(stage.steps)]
    counts: dict[tuple[str, Kind], int] = {}
    for number, (stage, step) in enumerate(steps):
        trainer.progress = type("Progress", (), {"step": number})
        kind = Kind(stage.kind != "align" or step % stage.passes == 0, trainer._measures(stage, step))
        counts[stage.name, kind] = counts.get((stage.name, kind), 0) + 1
    parts = parts_of(distill, DATA)
    assert {(part.stage.name, kind): n for part in parts for kind, n in part.counts.items()} == counts


def test_steps_with_a_moving_budget_are_a_part_of_their_own() -> None:
    stage = Stage("s", "distill", steps=10, budget_ramp=Ramp(0.0, 0.5), curriculum=Curriculum(32, 0.7))
    parts = parts_of(Distill((stage,)), DATA)
    progress = [ramp_progress(stage.budget_ramp, step, 10) for step in range(10)]
    assert progress[4] < progress[5] == progress[6] == 1
    found = [(part.shape.tokens, part.ramping, part.steps) for part in parts]
    assert found == [(32, False, 2), (32, True, 5), (64, False, 3)]  # step 0 and step 6; 1 to 5; 7 to 9
    assert parts[1].ramp == pytest.approx(sum(progress[1:6]) / 5)
    assert [(part.ramp, part.ramping) for part in parts_of(Distill((Stage("s", "distill", steps=2),)), DATA)] == [
        (1.0, False)
    ]


def test_saves_within_and_at_the_end_of_a_stage() -> None:
    stages = (Stage("a", "align", steps=5), Stage("b", "distill", steps=7))
    assert saves_of(Distill(stages, save_every_steps=3)) == {"a": (1, 1), "b": (2, 1)}  # after 3, 5; 6, 9, 12
    assert saves_of(Distill(stages, save_every_steps=100)) == {"a": (0, 1), "b": (0, 1)}


# Arithmetic.


def test_every_kind_of_step_counts_as_often_as_it_occurs() -> None:
    seconds = {NEW: [4.0, 4.2, 9.0], USED: [1.0, 1.0], USED_MEASURED: [1.5]}
    counts = {NEW_MEASURED: 1, NEW: 2, USED: 7, USED_MEASURED: 2}
    assert seconds_per_step(seconds, counts) == pytest.approx((3 * 4.2 + 9 * 1.0 + 3 * 0.5) / 12)


def test_kind_that_was_not_run_takes_what_is_nearest() -> None:
    assert seconds_per_step({NEW: [2.0]}, {NEW: 3, NEW_MEASURED: 1}) == 2
    assert seconds_per_step({USED: [2.0]}, {NEW: 3}) == 2
    assert seconds_per_step({NEW_MEASURED: [3.0]}, {NEW: 3}) == 3
    assert seconds_per_step({NEW: [2.0], NEW_MEASURED: [1.9]}, {NEW_MEASURED: 1}) == 2  # noise: measuring costs


def part(stage: Stage, shape: Shape) -> Part:
    return Part(stage, shape, {NEW: stage.steps})


def rehearsed(shape: Shape, accumulate: int, seconds: float, **changes: Any) -> Rehearsed:
    values = {"first_steps_seconds": 0.5, "peak_bytes": 900.0, "fixed_bytes": 100.0}
    return Rehearsed(shape, accumulate, {NEW: [seconds]}, **(values | changes))


def test_what_was_run_as_it_is_stays() -> None:
    stage = Stage("s", "distill", steps=10, batch_sequences=4, accumulate=2)
    found = forecast_part(part(stage, Shape(4, 64)), rehearsed(Shape(4, 64), 2, 2.0, reserved_bytes=1000.0), 900)
    assert (found.seconds_per_step, found.seconds, found.tokens_per_s) == (2.0, 20.0, 256.0)
    assert (found.peak_bytes, found.reserved_bytes, found.extrapolated, found.fits) == (900, 1000, False, True)


def test_fewer_micro_batches_are_scaled_in_time_alone() -> None:
    stage = Stage("s", "distill", steps=10, batch_sequences=4, accumulate=6)
    found = forecast_part(part(stage, Shape(4, 64)), rehearsed(Shape(4, 64), 1, 2.0), 900)
    assert (found.seconds_per_step, found.tokens_per_s) == (12.0, 128.0)
    assert (found.peak_bytes, found.extrapolated, found.fits) == (900, True, True)


def test_fewer_tokens_are_scaled_in_time_and_in_what_they_hold() -> None:
    stage = Stage("s", "distill", steps=10, batch_sequences=4, accumulate=6)
    found = forecast_part(part(stage, Shape(4, 64)), rehearsed(Shape(1, 32), 1, 0.5), 6000)
    assert found.seconds_per_step == 0.5 * 8 * 6
    assert found.peak_bytes == 100 + 8 * 800
    assert (found.extrapolated, found.fits) == (True, False)  # by what was scaled: nobody has tried


@pytest.mark.parametrize(
    ("shape", "recomputes", "advice"),
    [
        (Shape(2, 64), True, "Set batch_sequences: 2 with accumulate: 12."),
        (Shape(2, 64), False, "Set gradient_checkpointing: true, or batch_sequences: 2 with accumulate: 12."),
        (Shape(1, 32), True, "Set sequence_tokens: 32 with batch_sequences: 1."),
    ],
)
def test_what_does_not_fit_is_said_with_what_does(shape: Shape, recomputes: bool, advice: str) -> None:
    stage = Stage("s", "distill", steps=10, batch_sequences=4, accumulate=6)
    wanted = part(stage, Shape(4, 64))
    found = forecast_part(wanted, rehearsed(shape, 1, 1.0, peak_bytes=5e9, too_large=Shape(4, 64)), 8 * 2**30)
    text = problem_of(wanted, found, 8 * 2**30, recomputes=recomputes)
    assert "stage s: 4 x 64 tokens do not fit into 8.0 GiB" in text
    assert text.endswith(advice)
    fitting = forecast_part(wanted, rehearsed(Shape(4, 64), 6, 1.0), 1e9)
    assert problem_of(wanted, fitting, 1e9, recomputes=recomputes) == ""


def test_stages_have_the_seconds_of_their_steps_and_checkpoints() -> None:
    stages = (Stage("a", "align", steps=5), Stage("b", "distill", steps=7, curriculum=Curriculum(32, 0.5)))
    distill = Distill(stages, save_every_steps=3)
    parts = parts_of(distill, DATA)
    savings = {"align": Saving(2.0, 1000), "distill": Saving(6.0, 3000)}
    runs_of = [(one, rehearsed(one.shape, 1, 1.0 + number)) for number, one in enumerate(parts)]
    align, distil = forecast_stages(distill, runs_of, savings, 1e9, adapter_bytes=500)
    assert (align.saving_seconds, align.seconds) == (2 + 1, 5 + 3)
    assert (distil.saving_seconds, distil.steps) == (2 * 6 + 1, 7)
    assert distil.seconds == 13 + sum((2 + number) * one.steps for number, one in enumerate(parts[1:]))
    values = json.loads(json.dumps(distil.to_json()))
    assert values["tokens_per_s"] == pytest.approx(7 * 64 / (distil.seconds - 13))
    assert values["seconds_per_step"] == pytest.approx((distil.seconds - 13) / 7)
