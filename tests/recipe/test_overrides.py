"""--set: what it changes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridize.errors import RecipeError
from hybridize.recipe.reader import load_recipe
from hybridize.recipe.schema import Recipe

TEXT = """\
model: a/b
layers: [{use: G, every: 2}]
data: {train: [x.txt]}
distill:
  stages:
    - {name: one, kind: align, steps: 5}
"""


def read(folder: Path, *overrides: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(TEXT)
    return load_recipe(path, overrides=overrides)


def test_changes_values_lists_and_absent_groups(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        "distill.stages.0.steps=7",
        "distill.stages.0.loss.temperature=2",
        "data.train.1=y.txt",
        "evaluate.recall=null",
        "layers.0.offset=1",
        "seed=3",
        "seed=4",
    )
    assert recipe.distill is not None
    assert recipe.distill.stages[0].steps == 7
    assert recipe.distill.stages[0].loss.temperature == 2.0
    assert recipe.data is not None
    assert [source.path for source in recipe.data.train] == ["x.txt", "y.txt"]
    assert recipe.evaluate.recall is None
    assert recipe.layers.rules[0].offset == 1
    assert recipe.seed == 4
    assert recipe.origin is not None
    assert recipe.origin.overrides[-1] == "seed=4"


def test_a_whole_group_as_yaml(tmp_path: Path) -> None:
    recipe = read(tmp_path, "distill.stages=[{name: x, kind: distill, steps: 2}]")
    assert recipe.distill is not None
    assert [stage.name for stage in recipe.distill.stages] == ["x"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("distill..steps=3", "is not KEY=VALUE"),
        ("model.name=3", "has no keys"),
        ("distill.stages.5.steps=3", "is a list of 1"),
        ("distill.stages.first.steps=3", "is a list of 1"),
        ("distill.stages.-1.steps=3", "is a list of 1"),
        ("seed={", "is not valid YAML"),
        ("seed=!!python/name:os.system ''", "never run code"),
        ("seed=x", "expected a whole number"),
        ("sed=3", "did you mean 'seed'?"),
    ],
)
def test_refusals_show_the_override(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, override)
    assert f"--set {override}" in str(caught.value)
    assert says in str(caught.value)
