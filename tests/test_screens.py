"""The variants under recipes/screens: every one is a recipe that can be planned, no two are the same, and the measured
rows were made with their settings. And the rows of whole conversions, each of which has the files of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridize.mixers.registry import config_class
from hybridize.plan import plan
from hybridize.recipe.reader import load_recipe, recipe_to_dict
from tests.test_plan import SHIPPED_SIZES, config_folder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "results"
SCREENS = sorted((ROOT / "recipes" / "screens").glob("*.yaml"))


@pytest.mark.parametrize("path", SCREENS, ids=lambda path: path.stem)
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


@pytest.mark.parametrize("path", SCREENS, ids=lambda path: path.stem)
def test_measured_rows_have_the_settings_of_their_variants(path: Path) -> None:
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = rows_of(RESULTS / f"smollm2-135m--{path.stem}-screen.jsonl")
    measured = [row for row in rows if row.get("op") == "conversion"]
    assert measured
    for row in measured:
        assert row["set"] == [*spec["set"], *spec["variants"][row["variant"]]], row["variant"]
    assert len({row["variant"] for row in measured}) == len(measured)


def test_every_conversion_has_the_files_of_its_run_and_its_seed() -> None:
    rows = rows_of(RESULTS / "conversions.jsonl")
    assert sorted(row["run"] for row in rows) == sorted(path.name for path in (RESULTS / "conversions").iterdir())
    for row in rows:
        folder = RESULTS / "conversions" / row["run"]
        lock = json.loads((folder / "recipe.lock.json").read_text(encoding="utf-8"))
        assert row["seed"] == lock["recipe"]["seed"]
        assert row["recipe"] == row["run"].split(".")[0]
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["probes"]["recall"]["tasks"]
        assert row["niah2_4k"] == results["niah_single_2"]["4096"]["student"]["share"]
        assert row["tokens"] == rows_of(folder / "metrics.jsonl")[-1]["tokens"]
        assert (folder / "plan.json").is_file()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
