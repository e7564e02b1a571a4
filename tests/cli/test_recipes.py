"""recipes ls, show and copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridize.cli.shipped import shipped_recipes
from hybridize.recipe.reader import load_recipe
from tests.cli.conftest import Invoke


def test_list_has_every_recipe_with_its_summary(invoke: Invoke) -> None:
    values = invoke("recipes", "ls", "--json").json["recipes"]
    assert [entry["name"] for entry in values] == list(shipped_recipes())
    assert all(entry["summary"].endswith((".", ",")) for entry in values)
    assert "smollm2-135m--demo" in invoke("recipes", "ls").out


def test_show_is_the_file(invoke: Invoke) -> None:
    path = shipped_recipes()["smollm2-135m--demo"]
    assert invoke("recipes", "show", "smollm2-135m--demo").out == path.read_text()


def test_copy_finds_its_texts(invoke: Invoke, tmp_path: Path) -> None:
    to = tmp_path / "mine.yaml"
    assert invoke("recipes", "copy", "smollm2-135m--demo", to).code == 0
    data = load_recipe(to).data
    assert data is not None
    for source in (*data.train, *data.held_out):
        assert Path(source.path).is_absolute()
        assert list(Path(source.path).parent.glob(Path(source.path).name))
    refused = invoke("recipes", "copy", "smollm2-135m--demo", to)
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert invoke("recipes", "copy", "smollm2-135m--demo", to, "--overwrite").code == 0


def test_copy_of_a_file_takes_its_name(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shipped_recipes()["smollm2-135m--demo"]
    (tmp_path / "here").mkdir()
    (tmp_path / "mine.yaml").write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path / "here")
    assert invoke("recipes", "copy", tmp_path / "mine.yaml").code == 0
    assert invoke("recipes", "copy", "smollm2-135m--demo").code == 0
    assert sorted(each.name for each in Path().iterdir()) == ["mine.yaml", "smollm2-135m--demo.yaml"]


def test_unknown_name(invoke: Invoke) -> None:
    assert invoke("recipes", "show", "nothing").code == 3
    assert invoke("recipes", "list").code == 2
