"""Every fault of a recipe is told at once, with its line; whatever is read can be written and read again."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hybridize.errors import EXIT_RECIPE, RecipeError
from hybridize.mixers.registry import config_class
from hybridize.recipe.probes import PerplexityProbe
from hybridize.recipe.reader import load_recipe, recipe_from_dict, recipe_to_dict
from hybridize.recipe.schema import Distill, LayerPlan, LayerRule, Lora, Loss, MixerChoice, Ramp, Recipe, Stage
from hybridize.recipe.sources import TextSource

GOOD = """\
model: org/name@main
layers: "G T F"
mixers:
  T:
    mixer: token_eviction
    window_tokens: 64
data:
  train:
    - text/*.txt
distill:
  lora: {rank: 8}
  stages:
    - name: align
      kind: align
      steps: 10
      learning_rate: 1e-3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides=overrides, mixer_configs=config_class)


def problems_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    assert caught.value.exit_code == EXIT_RECIPE
    return str(caught.value)


def test_reads_what_is_written(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)
    assert recipe.layers == LayerPlan(pattern="G T F")
    assert recipe.mixers == {"T": MixerChoice("token_eviction", {"window_tokens": 64})}
    assert recipe.data is not None
    assert recipe.data.train == (TextSource("text/*.txt"),)
    assert recipe.distill is not None
    assert recipe.distill.lora == Lora(rank=8)
    assert recipe.distill.stages[0].learning_rate == 1e-3  # YAML 1.1 alone reads 1e-3 as text
    assert recipe.origin is not None
    assert recipe.origin.base == tmp_path
    assert recipe.origin.where("distill.stages.0.steps").endswith("recipe.yaml:15")
    assert recipe.origin.where("distill.stages.0.weight_decay").endswith("recipe.yaml:13")


BAD = [
    # (id, text in GOOD, its replacement, line, what the message says)
    ("unknown-key", "    window_tokens: 64", "    windw_tokens: 64", 6, "did you mean 'window_tokens'?"),
    ("unknown-top-key", "model: org/name@main", "model: a/b\nlayer: x", 2, "did you mean 'layers'?"),
    ("wrong-type", "      steps: 10", "      steps: ten", 15, "expected a whole number, found the text 'ten'"),
    ("bool-for-int", "      steps: 10", "      steps: true", 15, "expected a whole number, found the truth value"),
    ("float-for-int", "      steps: 10", "      steps: 10.0", 15, "expected a whole number"),
    ("number-for-text", "model: org/name@main", "model: 5", 1, "Put it in quotes"),
    ("negative-window", "    window_tokens: 64", "    window_tokens: -1", 6, "must exceed"),
    ("unknown-mixer", "    mixer: token_eviction", "    mixer: token_evict", 5, "native_sparse_attention"),
    ("unknown-loss", "      steps: 10", "      steps: 10\n      loss: {mse: 1}", 16, "unknown key"),
    ("bad-choice", "      kind: align", "      kind: alignn", 14, "Did you mean 'align'?"),
    ("nan-rate", "      learning_rate: 1e-3", "      learning_rate: .nan", 16, "not a finite number"),
    ("negative-rate", "      learning_rate: 1e-3", "      learning_rate: -1", 16, "must be positive"),
    ("huge-int", "      steps: 10", f"      steps: {10**30}", 15, "too large"),
    ("zero-rank", "  lora: {rank: 8}", "  lora: {rank: 0}", 11, "must be at least 1"),
    ("missing-key", "      steps: 10\n", "", 13, "the key 'steps' is missing"),
    ("null-group", "  lora: {rank: 8}", "  save_every_steps:", 11, "found nothing"),
    ("list-for-group", "data:\n  train:\n    - text/*.txt", "data: [a]", 7, "expected a group of keys"),
    ("text-for-list", "  train:\n    - text/*.txt", "  train: a", 8, "expected a list"),
    ("empty-list", "  train:\n    - text/*.txt", "  train: []", 8, "needs at least one source"),
    ("empty-model", "model: org/name@main", "model: ' '", 1, "is empty"),
    ("duplicate-key", "layers:", "model: x\nlayers:", 2, "is there twice (first at"),
    ("tab", "  lora: {rank: 8}", "\tlora: {rank: 8}", 11, "Indent with spaces"),
    ("not-yaml", "  lora: {rank: 8}", "  lora: {rank: 8", 12, "is not valid YAML"),
    ("python-tag", "model: org/name@main", "model: !!python/object/apply:os.system ['ls']", 1, "never run code"),
    ("python-name", "model: org/name@main", "model: !!python/name:os.system ''", 1, "never run code"),
    ("binary-tag", "model: org/name@main", "model: !!binary aGk=", 1, "is not allowed"),
    ("anchor", "model: org/name@main", "model: &m org/name", 1, "anchors"),
    ("second-document", "layers:", "---\nlayers:", 2, "is not valid YAML"),
    ("rule-of-two", 'layers: "G T F"', "layers: [{use: G, every: 2, range: 1-2}]", 2, "exactly one of"),
    ("pattern-and-rules", 'layers: "G T F"', "layers: {pattern: G, rules: [{use: G, every: 2}]}", 2, "not both"),
    ("date", "model: org/name@main", "model: org/name\nseed: 2024-01-01", 2, "expected a whole number"),
]


@pytest.mark.parametrize(("old", "new", "line", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_recipe(tmp_path: Path, old: str, new: str, line: int, says: str) -> None:
    assert old in GOOD
    message = problems_of(tmp_path, GOOD.replace(old, new, 1))
    assert f"recipe.yaml:{line}:" in message
    assert says in message


def test_ten_faults_at_once(tmp_path: Path) -> None:
    text = """\
model: 3
sed: 1
layers: {patern: G}
mixers:
  A: {mixer: token_eviction, budget_tokens: x, sink_tokens: -1}
  B: {mixer: nothing}
data: {train: [a.txt], held_out_share: 2, sequence_tokens: 1}
distill:
  stages: [{name: a, kind: distill, steps: 3, learning_rate: no}]
export: {dtype: int3}
"""
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    lines = [int(problem.split("recipe.yaml:")[1].split(":")[0]) for problem in caught.value.problems]
    assert lines == sorted(lines)
    assert len(lines) >= 10
    assert {1, 2, 3, 5, 6, 7, 9, 10} <= set(lines)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"], ids=["empty", "comment", "dashes"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    assert "recipe.yaml" in problems_of(tmp_path, text)


@pytest.mark.parametrize("text", ["just text", "[1, 2]", "3"])
def test_not_a_mapping(tmp_path: Path, text: str) -> None:
    assert "expected a group of keys" in problems_of(tmp_path, text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_folder_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe(tmp_path)


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: a\nseed: \xff\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: is not UTF-8"):
        load_recipe(path)


def test_too_large(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is larger than"):
        load_recipe(write(tmp_path, "#" * 1_000_001))


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000], ids=["lists", "groups", "dashes"])
def test_deep_nesting_ends(tmp_path: Path, text: str) -> None:
    problems_of(tmp_path, text)


def test_python_tag_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    problems_of(tmp_path, f"model: !!python/object/apply:os.mkdir ['{canary}']\nlayers: G\n")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[G, T]", LayerPlan(pattern="G T")),
        ("{pattern: [G, T]}", LayerPlan(pattern="G T")),
        ("[{use: G, every: 4, offset: 1}]", LayerPlan(rules=(LayerRule("G", every=4, offset=1),))),
        ("{rules: [{use: G, indices: [1, 2]}]}", LayerPlan(rules=(LayerRule("G", indices=(1, 2)),))),
        ("[{use: G, range: 1-3}]", LayerPlan(rules=(LayerRule("G", range="1-3"),))),
    ],
)
def test_ways_to_say_the_layers(tmp_path: Path, text: str, expected: LayerPlan) -> None:
    assert read(tmp_path, f"model: a/b\nlayers: {text}\n").layers == expected


def test_mixer_by_name_alone(tmp_path: Path) -> None:
    recipe = read(tmp_path, "model: a/b\nlayers: X F\nmixers: {X: sliding_window}\n")
    assert recipe.mixers["X"] == MixerChoice("sliding_window")


def test_mixer_options_are_left_alone_without_configurations(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a/b\nlayers: X\nmixers: {X: {mixer: anything, rate: 1e-4, sizes: [1, 2]}}\n")
    assert load_recipe(path).mixers["X"].options == {"rate": 1e-4, "sizes": (1, 2)}


def test_probe_set_to_null_is_left_out(tmp_path: Path) -> None:
    recipe = read(tmp_path, "model: a/b\nlayers: G F\nevaluate: {recall: null, perplexity: {max_windows: 3}}\n")
    assert recipe.evaluate.recall is None
    assert recipe.evaluate.perplexity == PerplexityProbe(max_windows=3)


names = st.text("abcdefgGTSNF_", min_size=1, max_size=6)
floats = st.floats(1e-6, 1e3)
layer_plans = st.one_of(
    st.builds(LayerPlan, pattern=st.lists(names, min_size=1, max_size=5).map(" ".join)),
    st.builds(
        LayerPlan,
        rules=st.lists(
            st.one_of(
                st.builds(LayerRule, use=names, indices=st.lists(st.integers(-2, 40), max_size=4).map(tuple)),
                st.builds(LayerRule, use=names, every=st.integers(3, 9), offset=st.integers(0, 2)),
                st.builds(LayerRule, use=names, range=st.sampled_from(["0-3", "5-9", "9-5", "x"])),
            ),
            min_size=1,
            max_size=3,
        ).map(tuple),
        allow_no_full_attention=st.booleans(),
    ),
)
mixer_choices = st.one_of(
    st.builds(
        MixerChoice,
        mixer=st.just("token_eviction"),
        options=st.fixed_dictionaries({}, optional={"window_tokens": st.integers(8, 600), "l1_max": st.just(2.5)}),
    ),
    st.builds(MixerChoice, mixer=st.just("sliding_window"), options=st.just({"sink_tokens": 0})),
)
stages = st.builds(
    Stage,
    name=names,
    kind=st.sampled_from(["align", "distill", "adapt"]),
    steps=st.integers(1, 10**6),
    learning_rate=floats,
    projection_learning_rate=st.none() | floats,
    weight_decay=floats,
    sequence_tokens=st.none() | st.integers(2, 10**6),
    loss=st.builds(Loss, kl=floats, direction=st.sampled_from(["forward", "reverse", "mixed"])),
    budget_ramp=st.none() | st.just(Ramp(0.25, 0.5)),
)
recipes = st.builds(
    Recipe,
    model=st.text(min_size=1, max_size=12).filter(lambda text: text.strip() and text.isprintable()),
    layers=layer_plans,
    mixers=st.dictionaries(names, mixer_choices, max_size=3),
    seed=st.integers(0, 2**31),
    distill=st.none()
    | st.builds(Distill, stages=stages.map(lambda stage: (stage,)), lora=st.none() | st.just(Lora(dropout=0.5))),
)


@given(recipe=recipes)
def test_round_trip_property(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    values = recipe_to_dict(recipe)
    assert recipe_from_dict(values, mixer_configs=config_class) == recipe
    assert read(folder, yaml.safe_dump(values, allow_unicode=True)) == recipe


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([field.name for cls in (Recipe, Stage, LayerPlan) for field in dataclasses.fields(cls)]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(tree=trees)
def test_any_data_gives_a_recipe_or_its_error_property(tree: Any) -> None:
    with contextlib.suppress(RecipeError):
        recipe_from_dict({"model": "a/b", "layers": "G", "extra": tree} if not isinstance(tree, dict) else tree)


@given(text=st.text(max_size=60) | st.lists(st.sampled_from(list(GOOD)), max_size=40).map("".join))
def test_any_text_gives_a_recipe_or_its_error_fuzz(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(RecipeError):
        load_recipe(path, mixer_configs=config_class)


@given(
    cut=st.integers(0, len(GOOD)), put=st.sampled_from(["\t", "\x00", "{", "&a ", "*a", "!!x ", "- ", "\ufeff", ": "])
)
def test_mutated_recipe_fuzz(cut: int, put: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_text(GOOD[:cut] + put + GOOD[cut:], encoding="utf-8")
    with contextlib.suppress(RecipeError):
        load_recipe(path, mixer_configs=config_class)
