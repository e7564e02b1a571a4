"""What a run is tied to, and what `distill` refuses before it works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridize.distillation.settings import differences, pinned_data
from hybridize.errors import RecipeError
from hybridize.recipe.schema import Data, LayerPlan, Stage
from hybridize.recipe.sources import TextSource
from tests.distillation import runs
from tests.tiny import tiny_teacher


def test_differences_name_every_changed_value() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    assert differences(before, before) == []
    assert differences(before, {"a": {"b": 2, "c": [1, 3]}, "e": None, "d": "x"}) == ["a.b: 1 → 2", "a.c.1: 2 → 3"]
    assert differences(before, {"a": {"b": 1, "c": [1]}, "d": "x"}) == ["a.c: [1, 2] → [1]"]


def test_resumed_run_keeps_its_revision_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(train=(TextSource("org/news"), TextSource("a.txt")))
    monkeypatch.setattr("hybridize.recipe.documents._hub_commit", lambda source: "1" * 40)
    assert [s.revision for s in pinned_data(tmp_path, data, tmp_path).train] == ["1" * 40, None]
    (tmp_path / "settings.json").write_text('{"revisions": ["%s", null]}' % ("0" * 40))
    assert pinned_data(tmp_path, data, tmp_path).train[0].revision == "1" * 40  # nothing was saved: begin anew
    (tmp_path / "checkpoints" / "step-0000001").mkdir(parents=True)
    assert [s.revision for s in pinned_data(tmp_path, data, tmp_path).train] == ["0" * 40, None]


@pytest.mark.parametrize("missing", ["data", "distill"])
def test_recipe_without_data_or_stages_is_refused(tmp_path: Path, missing: str) -> None:
    from hybridize.distillation.run import distill

    recipe = replace(runs.tiny_recipe(tmp_path), **{missing: None})
    with pytest.raises(RecipeError, match=f"no `{missing}`"):
        distill(recipe, tmp_path / "run", plan=None)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_stage_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    stages = (Stage("align", "align", steps=1),)
    recipe = replace(runs.tiny_recipe(tmp_path, lora=None, stages=stages), layers=LayerPlan(pattern="F S"), mixers={})
    runs.prepare(tmp_path, recipe)
    with pytest.raises(RecipeError, match="No layer has a parameter") as caught:
        runs.distil(tmp_path, recipe)
    assert caught.value.where == "stage align"


def test_teacher_is_the_one_that_was_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridize.distillation import run as module
    from hybridize.plan import plan

    asked = []

    def load_teacher(spec: str, **options: object) -> object:
        asked.append(spec)
        return tiny_teacher()

    recipe = runs.prepare(tmp_path)
    pinned = replace(plan(recipe, offline=True), model="org/model@main", revision="1" * 40)
    monkeypatch.setattr(module, "load_teacher", load_teacher)
    assert recipe.distill is not None
    module.load_pair(tmp_path / "run" / "converted", pinned, recipe.distill, False, torch.device("cpu"), True)
    assert asked == [pinned.teacher] == ["org/model@" + "1" * 40]
