"""A run whose mixers start from text: set once, before the first step, and the same in a run that was broken off."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridize.distillation import start_from_text as module
from hybridize.distillation.teacher import AttentionTrace
from hybridize.distillation.trainer import Trainer
from hybridize.errors import RecipeError
from hybridize.mixers.configs.gated_delta_net import GatedDeltaNetConfig
from hybridize.mixers.gated_delta_net import GatedDeltaNet
from hybridize.progress import SILENT
from hybridize.recipe.schema import Distill, LayerPlan, Recipe, Stage
from tests.distillation import runs
from tests.distillation.runs import STAGES, assert_same, rows
from tests.mixers.one_layer import LAYER, OneLayer

CALIBRATED = (replace(STAGES[0], calibrate_sequences=3), STAGES[1])
COPIES = ("plain", "packed", "straight", "broken")


def recipe_of(folder: Path, *, stages: tuple[Stage, ...] = CALIBRATED, packed: bool = False) -> Recipe:
    make = runs.packed_recipe if packed else runs.tiny_recipe
    return replace(make(folder, stages=stages), layers=LayerPlan(pattern="F G F G"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of a converted checkpoint for each test."""
    folder = tmp_path_factory.mktemp("calibrated")
    runs.write_teacher(folder)
    runs.write_texts(folder)
    runs.prepare(folder, recipe_of(folder))
    for name in COPIES:
        shutil.copytree(folder / "run", folder / name)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_only_new_parameters_are_set_and_the_first_error_is_smaller(
    folder: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    seen: list[tuple[int, int]] = []
    calibrate = GatedDeltaNet.calibrate

    def watched(self: GatedDeltaNet, calls: list[dict[str, Any]]) -> None:
        seen.append((self.layer_idx, len(calls)))
        assert all(call["hidden_states"].shape[:2] == (1, 32) for call in calls)
        assert any("cu_seqlens" in call for call in calls) == packed
        old = {name: p.clone() for name, p in self.named_parameters() if "hz_new" not in name}
        calibrate(self, calls)
        assert all(torch.equal(p, old[name]) for name, p in self.named_parameters() if name in old)

    monkeypatch.setattr(GatedDeltaNet, "calibrate", watched)
    name = "packed" if packed else "plain"
    runs.distil(folder, recipe_of(folder, packed=packed), name)
    with_text = rows(folder / name / "distill")
    assert seen == [(1, 3), (3, 3)]
    shutil.rmtree(folder / name / "distill")
    runs.distil(folder, recipe_of(folder, stages=STAGES, packed=packed), name)
    without = rows(folder / name / "distill")
    assert len(seen) == 2
    assert with_text[0]["error"] < 0.95 * without[0]["error"]
    # Sequences that calibrate are not counted as trained on.
    assert [row["tokens"] for row in with_text] == [row["tokens"] for row in without]


class _Broken(Exception):
    """Ends a run at a step, as a loss of power would."""


@pytest.mark.parametrize("broken_in", [1, 2, 3, 5])
def test_broken_off_and_run_again_it_ends_as_one_that_was_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, broken_in: int
) -> None:
    straight, broken = (folder / name / "distill" for name in ("straight", "broken"))
    runs.distil(folder, recipe_of(folder), "straight")
    shutil.rmtree(broken, ignore_errors=True)
    step = Trainer._step

    def breaking(self: Trainer, *args: Any) -> Any:
        if self.progress.step + 1 == broken_in:
            raise _Broken
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", breaking)
        with pytest.raises(_Broken):
            runs.distil(folder, recipe_of(folder), "broken")
    runs.distil(folder, recipe_of(folder), "broken")
    assert_same(broken, straight)


def test_without_a_mixer_that_can_it_is_refused(folder: Path) -> None:
    recipe = replace(recipe_of(folder / "evicting"), layers=LayerPlan(pattern="F T F T"))
    (folder / "evicting").mkdir()
    runs.write_texts(folder / "evicting")
    runs.write_teacher(folder / "evicting")
    runs.prepare(folder / "evicting", recipe)
    with pytest.raises(RecipeError, match="No layer has a mixer that starts from text"):
        runs.distil(folder / "evicting", recipe)


def test_sharded_weights_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_sharded", lambda parameter: True)
    shutil.copytree(folder / "run", folder / "sharded")
    with pytest.raises(RecipeError, match="while their weights are sharded"):
        runs.distil(folder, recipe_of(folder), "sharded")


@pytest.mark.parametrize("is_first", [True, False])
def test_all_processes_get_what_the_first_one_found(is_first: bool) -> None:
    """The other processes say a constant here; the first one must say what it found, any other nothing."""
    layer = OneLayer(GatedDeltaNetConfig())
    x = layer.hidden_states(1, 40)
    trace = AttentionTrace(x, layer.rope(x, torch.arange(40)[None]), layer.teacher(x))
    teacher = SimpleNamespace(trace=lambda batch, layers: dict.fromkeys(layers, trace))
    own: dict[str, Any] = dict(layer.mixer.new.named_parameters())
    student = SimpleNamespace(mixers=((LAYER, layer.mixer),), groups={"mixers": own}, trained=dict)
    others = 0.0 if is_first else 7.0
    processes = SimpleNamespace(is_first=is_first, sum=lambda values: values + others)
    arguments: tuple[Any, ...] = (CALIBRATED[0], student, teacher, [None], processes, nullcontext(), SILENT)
    module.start_from_text(*arguments)
    found = {name: parameter.clone() for name, parameter in own.items()}
    layer.mixer.calibrate([trace.inputs()])  # type: ignore[operator]
    for name, parameter in own.items():
        assert torch.equal(found[name], parameter if is_first else torch.full_like(parameter, 7.0)), name


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("distill",), "belongs to a stage of kind align, not distill"),
        (("distill", "align"), "is for the first stage alone, not for 1"),
    ],
)
def test_a_stage_that_cannot_calibrate_is_refused(kinds: tuple[Any, ...], message: str) -> None:
    last = len(kinds) - 1
    with pytest.raises(RecipeError, match=message):
        Distill(
            tuple(
                Stage(str(number), kind, steps=1, calibrate_sequences=number == last)
                for number, kind in enumerate(kinds)
            )
        )


def test_a_negative_number_of_sequences_is_refused() -> None:
    with pytest.raises(RecipeError, match="is negative: -1"):
        Stage("a", "align", steps=1, calibrate_sequences=-1)
