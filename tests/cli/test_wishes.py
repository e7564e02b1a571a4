"""What the options of `hybridize eval` ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridize.cli.wishes import PROBES, Wishes
from hybridize.recipe.probes import Evaluate, SpeedProbe
from hybridize.recipe.reader import load_evaluate, load_recipe
from hybridize.recipe.schema import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a/b\nlayers: G F\nevaluate: {recall: {samples: 7}}\n")
    return load_recipe(path)


def test_every_probe_can_be_asked_for() -> None:
    assert set(PROBES) | {"context_tokens", "batch_tokens", "precision"} == set(Evaluate.__dataclass_fields__)


def test_without_options_the_recipe_decides_else_the_quick_suite(recipe: Recipe) -> None:
    assert Wishes().settings(recipe) == recipe.evaluate
    assert Wishes().settings(None) == load_evaluate("quick")


def test_a_suite_replaces_what_the_recipe_says_and_changes_stand_above_it(recipe: Recipe) -> None:
    assert Wishes(suite="standard").settings(recipe) == load_evaluate("standard")
    changes = ("evaluate.recall.samples=2", "distill.lora.rank=4")
    wishes = Wishes(suite="standard", changes=changes).settings(recipe)
    assert wishes == load_evaluate("standard", overrides=changes[:1])


def test_named_probes_run_alone_with_their_settings_or_their_defaults(recipe: Recipe) -> None:
    wishes = Wishes(probes=("recall", "speed")).settings(recipe)
    assert wishes.recall == recipe.evaluate.recall
    assert wishes.speed == SpeedProbe()
    assert all(getattr(wishes, name) is None for name in PROBES if name not in ("recall", "speed"))


def test_files_and_tasks_ask_for_their_probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    wishes = Wishes(
        probes=("recall",),
        reading=("questions.jsonl",),
        choices=("bigbench.tar.gz:strategyqa",),
        harness="arc_easy, piqa,",
    ).settings(None)
    assert wishes.reading is not None
    assert wishes.choices is not None
    assert wishes.harness is not None
    assert [source.path for source in wishes.reading.sources] == [str(tmp_path / "questions.jsonl")]
    assert [source.path for source in wishes.choices.sources] == [str(tmp_path / "bigbench.tar.gz:strategyqa")]
    assert wishes.harness.tasks == ("arc_easy", "piqa")
    assert wishes.perplexity is None
