"""The variants under recipes/screens: every one is a recipe that can be planned, and no two are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hybridize.mixers.registry import config_class
from hybridize.plan import plan
from hybridize.recipe.reader import load_recipe, recipe_to_dict
from tests.test_plan import SHIPPED_SIZES, config_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "screens").glob("*.yaml")), ids=lambda path: path.stem)
def test_variants_plan_and_differ(tmp_path: Path, path: Path) -> None:
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    sizes = {"head_dim": 64, **SHIPPED_SIZES["smollm2-135m"]}
    folder = config_folder(tmp_path, **sizes)
    seen = {}
    for name, settings in spec["variants"].items():
        overrides = [*spec["set"], *settings, f"model={folder}"]
        recipe = load_recipe(path.parent / spec["recipe"], overrides=overrides, mixer_configs=config_class)
        assert plan(recipe).converted
        seen[json.dumps(recipe_to_dict(recipe), sort_keys=True)] = name
    assert len(seen) == len(spec["variants"])
