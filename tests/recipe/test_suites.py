from __future__ import annotations

from pathlib import Path

import pytest

from hybridize.errors import RecipeError
from hybridize.recipe.probes import Evaluate, ReadingProbe, RecallProbe
from hybridize.recipe.reader import load_evaluate, load_recipe, recipe_from_dict, recipe_to_dict
from hybridize.recipe.suites import suite_names


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_is_read_and_differs_from_the_defaults(name: str) -> None:
    assert load_evaluate(name) != Evaluate()


def test_the_standard_suite_asks_every_task_up_to_8k() -> None:
    recall = load_evaluate("standard").recall
    assert recall is not None
    assert len(recall.tasks) == 12
    assert recall.lengths == (1024, 2048, 4096, 8192)


def test_keys_of_a_recipe_stand_above_those_of_its_suite(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: a/b\nlayers: G F\n"
        "evaluate:\n  suite: standard\n  recall: {samples: 1, lengths: [512]}\n  samples: null\n"
    )
    recipe = load_recipe(path)
    standard = load_evaluate("standard")
    assert recipe.evaluate.recall is not None
    assert standard.recall is not None
    assert recipe.evaluate.recall.samples == 1
    assert recipe.evaluate.recall.lengths == (512,)
    assert recipe.evaluate.recall.tasks == standard.recall.tasks
    assert recipe.evaluate.samples is None
    assert recipe.evaluate.perplexity == standard.perplexity
    assert recipe_from_dict(recipe_to_dict(recipe)).evaluate == recipe.evaluate


def test_overrides_reach_into_a_suite() -> None:
    changed = load_evaluate("standard", overrides=("evaluate.recall.samples=9", "evaluate.reading=null"))
    assert changed.recall is not None
    assert (changed.recall.samples, changed.reading) == (9, None)
    assert load_evaluate(None, overrides=("evaluate.reading={}",)).reading == ReadingProbe()
    assert load_evaluate(None) == Evaluate(recall=RecallProbe())


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no suite 'standart'; there are .*standard"):
        load_evaluate("standart")
    with pytest.raises(RecipeError, match="model is no part of an evaluation"):
        load_evaluate(None, overrides=("model=x",))
    with pytest.raises(RecipeError, match=r"lenghts.*did you mean 'lengths'"):
        load_evaluate("quick", overrides=("evaluate.recall.lenghts=[1]",))
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a/b\nlayers: G F\nevaluate:\n  suite: fast\n")
    with pytest.raises(RecipeError, match="no suite") as error:
        load_recipe(path)
    assert error.value.where.endswith("recipe.yaml:4")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("evaluate.recall.samples=0", "samples: must be at least 1, is 0"),
        ("evaluate.recall.lengths=[1024, -1]", "lengths: must be at least 1, is -1"),
        ("evaluate.recall.depths=[0.1, 1.5]", r"depths: must be in 0\.\.1, is 1\.5"),
        ("evaluate.recall.tasks=[]", "tasks: is empty"),
        ("evaluate.baselines={policies: []}", "policies: is empty"),
        ("evaluate.speed={repeats: 0}", "repeats: must be at least 1"),
        ("evaluate.harness={num_fewshot: -1}", "num_fewshot: must be at least 0"),
    ],
)
def test_settings_that_ask_nothing_are_refused(change: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_evaluate("standard", overrides=(change,))


def test_nothing_is_a_wish_where_it_means_something() -> None:
    changes = (
        "evaluate.perplexity.position_edges=[0]",
        "evaluate.harness={num_fewshot: 0}",
        "evaluate.baselines={budgets: []}",
    )
    assert load_evaluate("standard", overrides=changes).baselines is not None
