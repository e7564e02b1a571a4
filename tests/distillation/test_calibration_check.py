"""Whether what was predicted comes true: the comparison by numbers, and on a GPU a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridize.distillation.calibration import Calibration
from hybridize.distillation.calibration_check import compare_stages, predicted_and_taken
from hybridize.distillation.forecast import Kind, Part, Rehearsed, StageForecast, forecast_part
from hybridize.distillation.schedule import Shape
from hybridize.plan import plan
from hybridize.recipe.schema import Stage
from tests.distillation import runs


def forecast(name: str, steps: int, seconds: float) -> StageForecast:
    shape = Shape(1, 32)
    part = Part(Stage(name, "distill", steps=steps), shape, {Kind(True, False): steps})
    one = forecast_part(part, Rehearsed(shape, 1, {Kind(True, False): [seconds]}, 0.0, 100.0, 50.0), 1e9)
    return StageForecast(name, "distill", (one,), saving_seconds=1.0)


def test_stages_are_compared_by_their_own_seconds() -> None:
    stages = (forecast("first", 2, 2.0), forecast("second", 3, 1.5))
    calibration = Calibration("a GPU", {}, 60.0, "", stages, 5.0, 1.0, 0.5, 1e9, 1000)
    assert (calibration.total_seconds, calibration.peak_bytes, calibration.problems) == (5 + 5 + 5.5 + 0.5, 100, ())
    rows = [{"stage": name, "seconds": s} for name, s in (("first", 1.0), ("first", 4.0), ("second", 15.0))]
    assert compare_stages(calibration, rows) == {
        "first": {"predicted": 5.0, "taken": 4.0, "ratio": 1.25},
        "second": {"predicted": 5.5, "taken": 11.0, "ratio": 0.5},
    }


@pytest.mark.gpu
def test_prediction_comes_true_on_a_gpu(tmp_path: Path) -> None:
    """Time of the steps once kernels are there, and memory, each within a fifth."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
    runs.write_teacher(tmp_path, **sizes, num_hidden_layers=8, max_position_embeddings=2048)
    runs.write_texts(tmp_path)
    stages = (
        Stage("align", "align", steps=200, batch_sequences=8, sequence_tokens=1024, passes=4),
        Stage("distill", "distill", steps=200, batch_sequences=8, accumulate=2, sequence_tokens=1024),
    )
    recipe = runs.tiny_recipe(tmp_path, stages=stages, save_every_steps=1000, precision="bfloat16")
    found = predicted_and_taken(
        recipe, tmp_path / "run", plan=plan(recipe, offline=True), base=tmp_path, seconds=30, offline=True
    )
    rows = [json.loads(line) for line in (tmp_path / "run/distill/metrics.jsonl").read_text().splitlines()]
    for stage in stages:
        seconds = [row["seconds"] for row in rows if row["stage"] == stage.name]
        steady = (seconds[-1] - seconds[40]) / (len(seconds) - 41)
        assert found["stages"][stage.name]["predicted"] / stage.steps == pytest.approx(steady, rel=0.2), stage.name
    assert found["peak"]["ratio"] == pytest.approx(1, abs=0.2)
