"""The curriculum, the rates and the ramp as functions of the step."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest

from hybridize.distillation.schedule import Shape, batch_shape, learning_rates, ramp_progress
from hybridize.errors import RecipeError
from hybridize.recipe.schema import Curriculum, Data, Distill, LayerPlan, Ramp, Recipe, Stage
from hybridize.recipe.sources import TextSource

DATA = Data(train=(TextSource("x.txt"),), sequence_tokens=64)


def stage(**changes: Any) -> Stage:
    return Stage("d", "distill", **{"steps": 24, "batch_sequences": 2, **changes})


def test_without_a_curriculum_every_step_is_alike() -> None:
    assert {batch_shape(stage(), DATA, step) for step in range(24)} == {Shape(2, 64)}
    assert batch_shape(stage(sequence_tokens=32), DATA, 0) == Shape(2, 32)


@pytest.mark.parametrize("end", [0.25, 0.5, 1.0])
def test_lengths_double_each_for_as_many_steps_and_a_step_keeps_its_tokens(end: float) -> None:
    made = stage(curriculum=Curriculum(start_tokens=16, end=end))
    shapes = [batch_shape(made, DATA, step) for step in range(24)]
    assert {shape.sequences * shape.tokens for shape in shapes} == {2 * 64}
    runs = [(shape.tokens, len(list(same))) for shape, same in groupby(shapes)]
    growing = round(end * 24) // 2
    assert runs == [(16, growing), (32, growing), *([(64, 24 - 2 * growing)] if end < 1 else [])]


def test_a_curriculum_that_begins_at_the_end_changes_nothing() -> None:
    assert batch_shape(stage(curriculum=Curriculum(start_tokens=64)), DATA, 0) == Shape(2, 64)


@pytest.mark.parametrize(("start", "example"), [(24, 32), (12, 16), (65, 64), (128, 64)])
def test_lengths_that_do_not_double_are_refused(start: int, example: int) -> None:
    with pytest.raises(RecipeError, match=f"{start} tokens do not become 64 by doubling") as caught:
        batch_shape(stage(curriculum=Curriculum(start_tokens=start)), DATA, 0)
    assert caught.value.where == "stage d"
    assert caught.value.hint is not None
    assert caught.value.hint == f"Begin with {example}, for example."


def test_the_example_doubles_to_the_length_and_a_recipe_is_refused_before_it_is_run() -> None:
    made = stage(curriculum=Curriculum(start_tokens=10))
    with pytest.raises(RecipeError, match="10 tokens do not become 100 by doubling") as caught:
        Recipe("m", LayerPlan("G"), data=replace(DATA, sequence_tokens=100), distill=Distill((made,)))
    assert caught.value.hint == "Begin with 25, for example."


def test_rates_warm_up_and_fall_along_a_cosine() -> None:
    made = stage(steps=13, warmup_steps=2, learning_rate=3.0, projection_learning_rate=0.3, final_share=0.1)
    rates = [learning_rates(made, step) for step in range(13)]
    assert [rate["mixers"] for rate in rates[:3]] == pytest.approx([1.0, 2.0, 3.0])
    assert rates[7]["mixers"] == pytest.approx(3.0 * 0.55)  # half of the way down
    assert rates[-1]["mixers"] == pytest.approx(0.3)
    assert all(rate["projections"] == rate["adapters"] == pytest.approx(rate["mixers"] / 10) for rate in rates)


def test_the_ramp_runs_between_its_two_shares() -> None:
    assert ramp_progress(None, 0, 11) == 1.0
    progress = [ramp_progress(Ramp(0.2, 0.6), step, 11) for step in range(11)]
    assert progress == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert ramp_progress(Ramp(0.0, 0.5), 0, 1) == 0.0
