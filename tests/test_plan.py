"""The plan: from config.json and headers alone, quickly, and for any recipe either a plan or a clear error."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.checkpoint import save_tensors
from hybridize.errors import CheckpointError, FamilyError, RecipeError
from hybridize.families import FAMILIES, family
from hybridize.mixers.registry import MIXERS, config_class
from hybridize.plan import ConversionPlan, plan
from hybridize.recipe.reader import load_recipe, recipe_from_dict

ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def config_folder(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A folder with nothing but config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **TINY, **changes}))
    return folder


def make(folder: Path, layers: Any = "G F", **more: Any) -> ConversionPlan:
    return plan(recipe_from_dict({"model": str(folder), "layers": layers, **more}, mixer_configs=config_class))


def write_weights(folder: Path, **shapes: tuple[int, ...] | None) -> None:
    """Weights of the family's shapes; `shapes` overrides some, None leaves one out (dots written as __)."""
    import torch

    config = json.loads((folder / "config.json").read_text())
    adapter = family(config["model_type"])
    wanted: dict[str, Any] = dict(adapter.tensor_shapes(adapter.geometry(config)))
    wanted.update({name.replace("__", "."): shape for name, shape in shapes.items()})
    save_tensors(folder, {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in wanted.items() if shape})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_config_alone_is_enough(tmp_path: Path, model_type: str) -> None:
    made = make(config_folder(tmp_path, model_type), "F S G N")
    assert [config.name for config in made.layers] == [
        "full_attention",
        "sliding_window",
        "gated_delta_net",
        "native_sparse_attention",
    ]
    assert made.family == model_type
    assert made.dtype == "bfloat16"
    assert made.converted == (1, 2, 3)
    assert any("could not be checked" in warning for warning in made.warnings)


def test_plan_of_8b_needs_no_weights_and_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    (tmp_path / "recipe.yaml").write_text(f"model: {tmp_path}\nlayers: F T G T\n")
    code = (
        "import sys; from hybridize.recipe import load_recipe; from hybridize.plan import plan\n"
        f"made = plan(load_recipe({str(tmp_path / 'recipe.yaml')!r}))\n"
        "print(made.bill.teacher_parameters, made.bill.state_bytes[131072]['teacher'])\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 8.03 B parameters as published; keys and values of 131072 tokens: 2 * 32 layers * 8 heads * 128 * 2 bytes each.
    assert done.stdout.split() == ["8030261248", str(131072 * 2 * 32 * 8 * 128 * 2)]


def test_json_round_trip(tmp_path: Path) -> None:
    made = make(config_folder(tmp_path / "model"), "G F", mixers={"G": {"mixer": "token_eviction", "l1_max": 0.5}})
    made.save(tmp_path / "plan.json")
    assert ConversionPlan.load(tmp_path / "plan.json") == made


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "hybridize-plan", "version": 1}'])
def test_damaged_plan_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CheckpointError):
        ConversionPlan.load(tmp_path / "plan.json")


def test_bill(tmp_path: Path) -> None:
    more = {
        "data": {"train": ["x.txt"], "sequence_tokens": 64},
        "distill": {
            "lora": {"rank": 2, "targets": ["down_proj"]},
            "keep_checkpoints": 1,
            "stages": [
                {"name": "a", "kind": "align", "steps": 10, "batch_sequences": 2, "accumulate": 3},
                {"name": "b", "kind": "distill", "steps": 5, "sequence_tokens": 128},
            ],
        },
    }
    made = make(config_folder(tmp_path), "F G", **more)
    bill, sizes = made.bill, made.geometry
    attention = 16 * (16 + 8 + 8 + 16)
    layer = attention + 3 * 16 * 24 + 2 * 16
    assert bill.teacher_parameters == 32 * 16 + 16 + 4 * layer
    new = 2 * made.layers[1].new_parameters(sizes)
    assert bill.new_parameters == new
    assert bill.trained_parameters == new + 2 * attention + 4 * 2 * (24 + 16)
    assert bill.train_tokens == 10 * 6 * 64 + 5 * 128
    assert bill.checkpoint_bytes == 2 * (bill.teacher_parameters + new)
    trained = bill.trained_parameters
    assert bill.disk_bytes == 2 * bill.checkpoint_bytes + trained * 12 * 2 + trained * 4
    kept = 4096 * 1 * 8 * 2 * 2
    assert bill.state_bytes[4096]["teacher"] == 4 * kept
    assert bill.state_bytes[4096]["student"] == 2 * kept + 2 * made.layers[1].state_bytes(sizes, 4096, 2)


def test_shared_scorers_are_counted_once(tmp_path: Path) -> None:
    options = {"mixer": "token_eviction", "scorer_sharing": "model"}
    made = make(config_folder(tmp_path), "T F", mixers={"T": options})
    assert made.bill.new_parameters == made.layers[0].new_parameters(made.geometry)


def test_the_export_is_on_the_bill_without_distillation_too(tmp_path: Path) -> None:
    folder = config_folder(tmp_path)
    bill = make(folder, export={"dtype": "float32"}).bill
    assert bill.disk_bytes == bill.checkpoint_bytes + 4 * (bill.teacher_parameters + bill.new_parameters)


def test_disk_holds_what_the_teacher_says_if_it_is_stored(tmp_path: Path) -> None:
    model = config_folder(tmp_path / "model")
    align = {"name": "a", "kind": "align", "steps": 6, "passes": 3}
    distill = {"name": "d", "kind": "distill", "steps": 5, "batch_sequences": 2, "sequence_tokens": 64}
    data = {"train": ["x.txt"], "sequence_tokens": 32}

    def disk_bytes(**cache: Any) -> int:
        return make(model, "G F", data=data, distill={"stages": [align, distill], **cache}).bill.disk_bytes

    cached = disk_bytes(teacher_cache={"top_k": 8})
    assert cached - disk_bytes() == 5 * 2 * 64 * (4 * 8 + 4)
    plan = make(model, "G F")
    inputs = 2 * 32 * len(plan.converted) * plan.geometry.hidden_size * 2
    assert disk_bytes(teacher_cache={"top_k": 8, "layer_inputs": True}) - cached == inputs


def test_teacher_windows_count_in_the_bill(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, "mistral", sliding_window=1024, tie_word_embeddings=False)
    made = make(folder, "F F F G")
    assert made.bill.state_bytes[4096]["teacher"] == 4 * 1024 * 8 * 2 * 2
    assert any("the teacher has a sliding window" in warning for warning in made.warnings)


def test_window_over_context_warns(tmp_path: Path) -> None:
    made = make(config_folder(tmp_path), "S F", mixers={"S": {"mixer": "sliding_window", "window_tokens": 5000}})
    assert any("layers 0, 2:" in warning and "covers the whole context" in warning for warning in made.warnings)
    more = {"data": {"train": ["x.txt"], "sequence_tokens": 8192}}
    longer = make(config_folder(tmp_path), "S F", mixers={"S": {"mixer": "sliding_window"}}, **more)
    assert any("are longer than the 4096 of the teacher" in warning for warning in longer.warnings)


def test_weights_that_fit(tmp_path: Path) -> None:
    write_weights(config_folder(tmp_path))
    made = make(tmp_path)
    assert not any("could not be checked" in warning for warning in made.warnings)
    write_weights(tmp_path, lm_head__weight=(32, 16))  # tied weights may be there twice
    assert make(tmp_path).fingerprint != made.fingerprint


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model__layers__3__mlp__up_proj__weight": None}, "1 missing: model.layers.3.mlp.up_proj.weight"),
        ({"model__layers__4__mlp__up_proj__weight": (24, 16)}, "1 unexpected"),
        ({"model__norm__weight": (17,)}, "model.norm.weight is [17], expected [16]"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    write_weights(config_folder(tmp_path), **change)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path)
    assert says in str(caught.value)


def test_pickle_only_is_refused(tmp_path: Path) -> None:
    config_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    with pytest.raises(CheckpointError, match="pickle"):
        make(tmp_path)


def test_unknown_family_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match="llama, qwen2, qwen3, mistral"):
        make(config_folder(tmp_path, "gpt2"))


def test_a_hybrid_is_not_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match="is a hybrid already"):
        make(config_folder(tmp_path, "hybridize_llama", hybridize={"version": 1, "layers": []}))


def test_mixer_that_does_not_fit_says_why(tmp_path: Path) -> None:
    options = {"mixer": "token_eviction", "scorer_layers": 5, "scorer_dilation": 1}
    with pytest.raises(RecipeError) as caught:
        make(config_folder(tmp_path), "T F", mixers={"T": options})
    assert "layers 0, 2: token_eviction: 5 scorer layers" in str(caught.value)


def test_options_of_a_recipe_made_in_python_are_checked(tmp_path: Path) -> None:
    recipe = recipe_from_dict(
        {
            "model": str(config_folder(tmp_path)),
            "layers": "T F",
            "mixers": {"T": {"mixer": "token_eviction", "windw_tokens": 3}, "U": {"mixer": "unheard_of"}},
        }
    )
    with pytest.raises(RecipeError) as caught:
        plan(recipe)
    assert "did you mean 'window_tokens'?" in str(caught.value)
    assert "unknown mixer 'unheard_of'" in str(caught.value)


def test_layer_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    model = config_folder(tmp_path / "model")
    path.write_text(f"model: {model}\nlayers:\n  - use: G\n    indices: [32]\n")
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(path, mixer_configs=config_class))
    assert "recipe.yaml:3: layers.rules.0: 32 is outside 0..3 (model has 4 layers)" in str(caught.value)


@given(
    pattern=st.lists(st.sampled_from(["G", "T", "S", "N", "F", "Q", "x"]), min_size=1, max_size=5),
    options=st.dictionaries(
        st.sampled_from(["window_tokens", "budget_tokens", "sink_tokens", "score", "rope", "block_tokens", "no"]),
        st.integers(-5, 700) | st.booleans() | st.text(max_size=3) | st.none() | st.floats(),
        max_size=3,
    ),
    mixer=st.sampled_from([*MIXERS, "none"]),
    heads=st.sampled_from([(2, 1), (4, 4), (3, 1)]),
    head_size=st.sampled_from([1, 2, 8]),
    opt_in=st.booleans(),
)
def test_plan_is_total_property(
    tmp_path_factory: pytest.TempPathFactory,
    pattern: list[str],
    options: dict[str, Any],
    mixer: str,
    heads: tuple[int, int],
    head_size: int,
    opt_in: bool,
) -> None:
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": head_size}
    folder = config_folder(tmp_path_factory.getbasetemp() / "total", **sizes)
    layers = {"pattern": " ".join(pattern), "allow_no_full_attention": opt_in}
    recipe = recipe_from_dict({"model": str(folder), "layers": layers})
    choice = recipe_from_dict({"model": "m", "layers": "G", "mixers": {"x": {"mixer": mixer, **options}}}).mixers
    with contextlib.suppress(RecipeError):
        made = plan(replace(recipe, mixers=choice))
        assert len(made.layers) == 4
        assert ConversionPlan.from_json(json.loads(json.dumps(made.to_json()))) == made


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHIPPED_SIZES = {
    "llama-3.2-1b": {"model_type": "llama", "num_hidden_layers": 16, "hidden_size": 64, "num_attention_heads": 32},
    "llama-3-8b": {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 64, "num_attention_heads": 32},
    "qwen3-1.7b": {"model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 64, "num_attention_heads": 16},
    "mistral-7b": {"model_type": "mistral", "num_hidden_layers": 32, "hidden_size": 64, "num_attention_heads": 32},
    "smollm2-135m": {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_plan(tmp_path: Path, path: Path) -> None:
    """Against a model of the same family and depth."""
    comment = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert {"Cost:", "Result:"} <= set(comment.replace("\n", " ").split())
    sizes = dict(SHIPPED_SIZES[path.stem.split("--")[0]])
    folder = config_folder(tmp_path, **{"head_dim": 64, **sizes})
    recipe = load_recipe(path, overrides=[f"model={folder}"], mixer_configs=config_class)
    made = plan(recipe)
    assert made.converted
    assert made.bill.train_tokens > 0
    assert made.bill.state_bytes[32768]["student"] < 0.7 * made.bill.state_bytes[32768]["teacher"]
    assert recipe.data is not None
    for source in (*recipe.data.train, *recipe.data.held_out):
        elsewhere = source.format == "hub" or source.path.startswith("package:")
        assert elsewhere or list(path.parent.glob(source.path))


def test_recipes_cover_every_family() -> None:
    assert len(RECIPES) >= 6


@pytest.mark.parametrize(("dtype", "beside"), [("auto", False), ("float32", True)])
def test_memory_counts_the_file_when_the_dtype_changes(tmp_path: Path, dtype: str, beside: bool) -> None:
    write_weights(config_folder(tmp_path))
    bill = make(tmp_path, dtype=dtype).bill
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    program = bill.convert_memory_bytes - bill.checkpoint_bytes - (size if beside else 0)
    assert program == 450 * 2**20


def test_a_scorer_for_the_whole_model_is_billed_once(tmp_path: Path) -> None:
    def new_parameters(pattern: str) -> int:
        shared = {"mixer": "token_eviction", "scorer_sharing": "model"}
        mixers = {"A": {**shared, "window_tokens": 64}, "B": {**shared, "window_tokens": 128}}
        return make(config_folder(tmp_path / pattern.replace(" ", "")), pattern, mixers=mixers).bill.new_parameters

    assert new_parameters("F A F B") == new_parameters("F A F F") > 0
