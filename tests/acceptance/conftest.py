"""A project whose parts the cases break, and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.acceptance.project import RECIPE
from tests.cli.conftest import invoke

__all__ = ["invoke"]


@pytest.fixture(scope="session", autouse=True)
def quick_exports(exports_read_by_children: None) -> None:
    """Of every test here that does not ask for another way."""


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher` (one file), `sharded` (two files and an index), texts and recipe.yaml. Copy it."""
    from safetensors.torch import load_file, save_file

    from tests.distillation.runs import write_teacher, write_texts

    folder = tmp_path_factory.mktemp("sound")
    write_teacher(folder)
    write_texts(folder)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    shutil.copytree(folder / "teacher", folder / "sharded")
    whole = folder / "sharded" / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: shards[2 * index >= len(names)] for index, name in enumerate(names)}
    for shard in shards:
        part = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(part, folder / "sharded" / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def hybrid(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder. Copy it."""
    from hybridize.cli.main import run

    out = tmp_path_factory.mktemp("hybrid") / "converted"
    here = str(sound / "recipe.yaml")
    assert run(["-q", "convert", here, "--model", str(sound / "teacher"), "--out", str(out)]) == 0
    return out
