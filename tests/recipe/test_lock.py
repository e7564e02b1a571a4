"""The lock: the same recipe goes on, another one is refused with the difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridize.errors import RecipeError
from hybridize.recipe.lock import FILE, differences, make_lock, read_lock, recipe_sha256, require_same, write_lock
from hybridize.recipe.reader import load_recipe, recipe_from_dict, recipe_to_dict
from hybridize.recipe.schema import Recipe

VALUES = {
    "model": "a/b",
    "layers": "G F",
    "data": {"train": ["x.txt"]},
    "distill": {"stages": [{"name": "one", "kind": "distill", "steps": 5, "learning_rate": 1e-4}]},
}


def recipe() -> Recipe:
    return recipe_from_dict(VALUES)


def test_lock_holds_the_whole_recipe(tmp_path: Path) -> None:
    write_lock(tmp_path, make_lock(recipe(), "f" * 64))
    lock = read_lock(tmp_path)
    assert lock is not None
    assert lock.load() == recipe()
    assert lock.recipe_sha256 == recipe_sha256(recipe())
    assert {"python", "torch", "transformers"} <= set(lock.versions)


def test_no_lock(tmp_path: Path) -> None:
    assert read_lock(tmp_path) is None


def test_same_recipe_goes_on_and_writes_nothing(tmp_path: Path) -> None:
    require_same(tmp_path, recipe(), "f")
    before = (tmp_path / FILE).read_bytes()
    assert require_same(tmp_path, recipe(), "f").recipe == json.loads(json.dumps(recipe_to_dict(recipe())))
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_changed_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    require_same(tmp_path, recipe(), "f")
    changed = recipe_from_dict({**VALUES, "seed": 7, "distill": {**VALUES["distill"], "lora": {"rank": 4}}})  # type: ignore[dict-item]
    with pytest.raises(RecipeError) as caught:
        require_same(tmp_path, changed, "f")
    assert "seed: 0 → 7" in caught.value.problems
    assert "distill.lora.rank: (absent) → 4" in caught.value.problems
    assert "--overwrite" in str(caught.value)


def test_changed_teacher_is_refused(tmp_path: Path) -> None:
    require_same(tmp_path, recipe(), "f" * 64)
    with pytest.raises(RecipeError, match="its files changed"):
        require_same(tmp_path, recipe(), "0" * 64)


def test_layout_and_comments_do_not_count(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("model: a/b\nlayers: G F\nseed: 1\n")
    two.write_text("# other\nseed: 1\nlayers: [G, F]\nmodel: 'a/b'\n")
    assert recipe_sha256(load_recipe(one)) == recipe_sha256(load_recipe(two))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "hybridize-lock", "version": 99}', '{"format": "x", "version": 1}']
)
def test_damaged_lock(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_lock(tmp_path)


def test_differences_of_lists_and_absent_keys() -> None:
    old = {"a": 1, "b": [1, 2], "c": {"d": None}, "e": [{"x": 1}]}
    new = {"a": 1, "b": [1, 3], "c": {"d": {"f": True}}, "e": [{"x": 1}, {"x": 2}]}
    assert differences(old, new) == [
        "b: [1, 2] → [1, 3]",
        "c.d: null → (absent)",
        "c.d.f: (absent) → true",
        "e.1.x: (absent) → 2",
    ]
