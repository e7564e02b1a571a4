"""A run with a teacher cache: what one has stored serves another, which learns the same without asking the teacher."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridize.distillation.teacher import Teacher
from hybridize.errors import RecipeError
from hybridize.recipe.schema import Loss, Recipe, Stage, TeacherCache
from tests.distillation import runs

STAGES = (
    replace(runs.STAGES[0], passes=1),
    replace(runs.STAGES[1], loss=Loss(cross_entropy=0.1)),
)


def recipe(folder: Path, **cache: Any) -> Recipe:
    options: dict[str, Any] = {"top_k": 16, "layer_inputs": True, "folder": "shared"}
    return runs.tiny_recipe(folder, stages=STAGES, teacher_cache=TeacherCache(**options | cache), save_every_steps=2)


def adapter(folder: Path, made: Recipe, run: str) -> bytes:
    return (runs.distil(folder, made, run) / "adapter_model.safetensors").read_bytes()


def test_another_run_learns_the_same_from_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.prepare(tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "second")
    shutil.copytree(tmp_path / "run", tmp_path / "third")
    shutil.copytree(tmp_path / "run", tmp_path / "fourth")
    first = adapter(tmp_path, recipe(tmp_path), "run")
    assert list((tmp_path / "shared").glob("*.safetensors"))

    def asked(self: Teacher, *args: Any) -> Any:
        raise AssertionError("the teacher was asked")

    with monkeypatch.context() as patch:
        for name in ("last_hidden", "trace"):
            patch.setattr(Teacher, name, asked)
        assert adapter(tmp_path, recipe(tmp_path), "second") == first
        # Another order and other batches of the same rows; a stage more.
        stages = (replace(STAGES[0], batch_sequences=2, accumulate=1), STAGES[1])
        other = replace(recipe(tmp_path), distill=replace(recipe(tmp_path).distill, stages=stages))  # type: ignore[type-var]
        adapter(tmp_path, other, "third")
    with pytest.raises(RecipeError, match="top_k"):
        runs.distil(tmp_path, recipe(tmp_path, top_k=8), "fourth")


def test_what_a_cache_does_not_hold_is_refused() -> None:
    with pytest.raises(RecipeError, match="hidden"):
        replace(recipe(Path()).distill, stages=(Stage("d", "distill", 1, loss=Loss(hidden=0.1)),))  # type: ignore[type-var]
