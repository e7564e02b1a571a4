"""hybridize choose, as a user calls it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from hybridize.mixers.registry import MIXERS, config_class
from hybridize.recipe.layers import choose_mixers
from hybridize.recipe.reader import load_recipe
from tests.cli.conftest import RECIPE, Invoke

QUICK = ("--sequences", 3, "--sequence-tokens", 64, "--window", 8, "--sinks", 1, "--dtype", "float32")


def test_from_the_recipe(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "choice.json"
    plain = invoke("choose", recipe, *QUICK, "--count", 1, "--set", "layers=F T T F", "--out", out)
    assert plain.code == 0, plain.err
    values = json.loads(out.read_text())
    assert values["schema"] == "hybridize/choose/1"
    (step,) = values["steps"]
    assert values["full_attention"] == [step["layer"]]
    assert sorted([*values["full_attention"], *values["others"]]) == [0, 1, 2, 3]
    assert step["divergence"] == min(row["divergence"] for row in values["full_alone"]) < values["all_windowed"]
    assert [row["layer"] for row in values["windowed_alone"]] == [0, 1, 2, 3]
    assert {row["name"]: row["layers"] for row in values["compared"]} == {
        "evenly spaced, first of each stretch": [0],
        "evenly spaced, last of each stretch": [3],
        "of the recipe": [0, 3],
    }
    expected = {"count": 1, "sequences": 3, "sequence_tokens": 64, "window_tokens": 8, "sink_tokens": 1, "seed": 0}
    assert values["settings"].items() >= {**expected, "dtype": "float32"}.items()
    assert values["teacher"]["model"] == str(recipe.parent / "teacher")
    assert {"torch", "hybridize"} <= set(values["versions"])
    row = next(line.split() for line in plain.out.splitlines() if line.startswith("1 layer "))
    assert row[2:4] == [str(step["layer"]), f"{step['divergence']:.4f}"]
    assert all(f"{line}\n" in plain.out for line in values["recipe_lines"])
    again = invoke("choose", recipe, *QUICK, "--count", 1, "--set", "layers=F T T F", "--json").json
    assert again == values


def test_texts_are_known_by_their_hashes(invoke: Invoke, recipe: Path) -> None:
    values = invoke("choose", recipe, *QUICK, "--json").json
    assert values["settings"]["count"] == 2  # as in the recipe
    assert len(values["sequences"]) == 3
    for row in values["sequences"]:
        text = (recipe.parent / row["document"]).read_text()
        assert row["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert row["document"].startswith("text/")


def test_the_lines_are_those_of_a_recipe(invoke: Invoke, project: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = RECIPE.format(folder=project).replace("text/*", f"{project}/text/*").replace("held/*", f"{project}/held/*")
    path.write_text(text)
    result = invoke("choose", path, *QUICK, "--count", 2, "--json")
    values = result.json
    assert sorted(values["other_mixers"]) == ["T", "gated_delta_net"]
    path.write_text(text.replace("layers: F T G F", "\n".join(values["recipe_lines"])))
    choices = choose_mixers(load_recipe(path, mixer_configs=config_class), 4, tuple(MIXERS))
    full = [index for index, (_, choice) in enumerate(choices) if choice.mixer == "full_attention"]
    assert full == values["full_attention"]
    assert [index for index, (key, _) in enumerate(choices) if key == "mixers.T"] == values["others"]
    assert "warning: The recipe uses T" in invoke("choose", path, *QUICK, "--set", "layers=F T G F").err


def test_given_text_without_what_is_held_out(invoke: Invoke, project: Path, tmp_path: Path) -> None:
    held_out = (project / "held" / "x.txt").read_text()
    other = "Quite another text that is long enough. " * 9
    (tmp_path / "texts.txt").write_text(f"{held_out}\0{other}")
    arguments = ("choose", project / "recipe.yaml", *QUICK, "--json", "--text")
    result = invoke(*arguments, f"mine:{tmp_path / 'texts.txt'}")
    assert result.code == 0, result.err
    assert {row["sha256"] for row in result.json["sequences"]} == {hashlib.sha256(other.encode()).hexdigest()}
    (tmp_path / "texts.txt").write_text(held_out)
    refused = invoke(*arguments, tmp_path / "texts.txt")
    assert refused.code == 3
    assert "held out" in refused.json["error"]["message"]


def test_a_recipe_without_text(invoke: Invoke, project: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {project / 'teacher'}\nlayers: F G\n")
    refused = invoke("choose", path, *QUICK)
    assert refused.code == 3
    assert "Give --text PATH" in refused.err
    assert invoke("choose", path, *QUICK, "--text", project / "text" / "*.txt").code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--count", 0), "must be 1 to 3, for 4 layers, and is 0"),
        (("--count", 4), "must be 1 to 3, for 4 layers, and is 4"),
        (("--set", "layers={pattern: T, allow_no_full_attention: true}"), "so many do in the recipe. Give --count"),
        (("--window", 63), "leaves nothing unseen in sequences of 64"),
        (("--window", 64), "leaves nothing unseen in sequences of 64"),
        (("--sequence-tokens", 513), "the model has 512 positions"),
        (("--sequence-tokens", 400), "121 tokens are the most of which"),
        (("--sequences", 99), "sequences of 64 tokens of one document each, not 99"),
        (("--out", "TAKEN"), "the file is there already"),
        (("--out", "no/such/folder.json"), "there is no such folder"),
    ],
)
def test_refusals(invoke: Invoke, recipe: Path, tmp_path: Path, arguments: tuple[str | int, ...], says: str) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    filled = [taken if argument == "TAKEN" else argument for argument in arguments]
    result = invoke("choose", recipe, *QUICK, *filled)
    assert result.code == 2, result.err
    assert says in result.err
    assert taken.read_text() == "mine"


def test_a_file_may_be_replaced(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "choice.json"
    out.write_text("{}")
    assert invoke("choose", recipe, *QUICK, "--out", out, "--overwrite").code == 0
    assert json.loads(out.read_text())["num_layers"] == 4


def test_hybrids_are_refused(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    assert invoke("-q", "convert", recipe, "--out", tmp_path / "hybrid").code == 0
    result = invoke("choose", recipe, *QUICK, "--model", tmp_path / "hybrid")
    assert result.code == 4
    assert "Give its teacher" in result.err
