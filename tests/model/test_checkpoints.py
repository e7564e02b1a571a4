"""Conversion, loading and export on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hybridize.checkpoint import read_manifest, verify_folder
from hybridize.errors import CheckpointError, NumbersError, RecipeError, UsageError, VerificationError
from hybridize.mixers.registry import config_class
from hybridize.model import export as export_module
from hybridize.model.convert import convert
from hybridize.model.export import export
from hybridize.model.load import load_any, load_hybrid, load_teacher, load_tokenizer
from hybridize.model.register import register
from hybridize.model.swap import mixers, swap, undo
from hybridize.plan import plan
from hybridize.recipe.schema import Export, LayerPlan, MixerChoice
from tests.distillation.runs import tiny_recipe, write_teacher
from tests.tiny import tiny_teacher, tiny_tokens

TOKENS = tiny_tokens(2, 30, seed=3) % 60


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a teacher and its conversion."""
    folder = tmp_path_factory.mktemp("project")
    write_teacher(folder)
    convert(plan(tiny_recipe(folder)), folder / "converted")
    return folder


@pytest.fixture(scope="module")
def exported(project):
    return export(project / "converted", project / "export", settings=Export(dtype="bfloat16"))


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def test_a_conversion_verifies_and_holds_the_teachers_weights(project):
    verify_folder(project / "converted")
    teacher = load_teacher(project / "teacher", dtype=torch.float32)
    hybrid = load_hybrid(project / "converted", dtype=torch.float32)
    own = dict(teacher.named_parameters())
    for name, parameter in hybrid.named_parameters():
        if "hz_new" not in name:
            assert torch.equal(parameter, own.pop(name)), name
    assert not own
    assert hybrid.lm_head.weight is hybrid.model.embed_tokens.weight


def test_a_conversion_is_the_same_bytes_every_time(project, tmp_path):
    again = convert(plan(tiny_recipe(project)), tmp_path / "again")
    first, second = (read_manifest(folder).files for folder in (project / "converted", again))
    assert first == second


def test_an_existing_folder_is_not_overwritten_unasked(project, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        convert(plan(tiny_recipe(project)), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_a_missing_tensor_is_named(project, tmp_path):
    from safetensors.torch import load_file, save_file

    convert(plan(tiny_recipe(project)), tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if "hz_new" in name)
    del tensors[gone]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=gone):
        load_hybrid(tmp_path / "out", dtype=torch.float32, complete=False)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    write_teacher(tmp_path)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NumbersError, match=r"layers\.2\.mlp\.up_proj"):
        load_teacher(tmp_path / "teacher", dtype=torch.float32)


def test_a_plain_model_is_not_taken_for_a_hybrid(project):
    with pytest.raises(CheckpointError, match="not a hybrid"):
        load_hybrid(project / "teacher", dtype=torch.float32)
    assert type(load_any(project / "teacher", dtype=torch.float32)).__name__ == "LlamaForCausalLM"


def test_auto_classes_load_a_hybrid_once_registered(project):
    register()
    register()
    assert AutoConfig.from_pretrained(project / "converted").model_type == "hybridize_llama"
    model = AutoModelForCausalLM.from_pretrained(project / "converted")
    assert torch.equal(logits(model), logits(load_hybrid(project / "converted", dtype=torch.float32)))


def test_transformers_alone_does_not_take_a_hybrid_for_its_base(project):
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except Exception as error:\n    print(type(error).__name__)\nelse:\n    print('loaded')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(project / "converted")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() != "loaded"


def test_an_export_holds_what_others_need(exported):
    verify_folder(exported)
    config = json.loads((exported / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hybridize.HybridizeLlamaForCausalLM"
    assert config["dtype"] == "bfloat16"
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "token_eviction" in card
    assert load_tokenizer(exported)("abc").input_ids == load_tokenizer(exported.parent / "teacher")("abc").input_ids


def test_bfloat16_is_the_rounding_of_the_weights_and_of_nothing_else(project, exported):
    model = export_module.cast_weights(load_hybrid(project / "converted", dtype=torch.float32), torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(logits(load_hybrid(exported, dtype=torch.bfloat16)), logits(model))


def test_shards_hold_the_same_weights(project, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "subprocess", subprocess)  # read back by an interpreter of its own
    sharded = export(
        project / "converted", tmp_path / "sharded", settings=Export(dtype="bfloat16", max_shard_bytes=20_000)
    )
    assert (sharded / "model.safetensors.index.json").is_file()
    one, many = (load_hybrid(folder, dtype=torch.bfloat16) for folder in (exported, sharded))
    assert torch.equal(logits(one), logits(many))


def test_a_folder_that_generates_something_else_gets_no_name(project, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "greedy", lambda model, prompt: [-1])
    with pytest.raises(VerificationError, match="other tokens"):
        export(project / "converted", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_load_elsewhere_gets_no_name(project, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "bundle", lambda *_: {"modeling_hybridize.py": "raise OSError('no such code')"})
    with pytest.raises(VerificationError, match=r"does not load without hybridize: OSError: no such code"):
        export(project / "converted", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_is_not_exported(project, tmp_path):
    run = tmp_path / "run"
    convert(plan(tiny_recipe(project)), run / "converted")
    (run / "distill" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="not finished"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_one_scorer_for_the_whole_model_is_one_module(family, tmp_path):
    from hybridize.model.convert import save_model

    config = config_class("token_eviction")(window_tokens=14, sink_tokens=1, budget_tokens=6, scorer_sharing="model")
    hybrid = swap(tiny_teacher(family), [config] * 4)
    scorers = {id(mixer.new.scorer) for _, mixer in mixers(hybrid)}
    controllers = {id(mixer.new.controller) for _, mixer in mixers(hybrid)}
    assert len(scorers) == 1
    assert len(controllers) == 4
    save_model(hybrid, tmp_path)
    loaded = load_hybrid(tmp_path, dtype=torch.float32, complete=False)
    assert len({id(mixer.new.scorer) for _, mixer in mixers(loaded)}) == 1
    assert torch.equal(logits(loaded), logits(hybrid))


def test_what_was_not_swapped_cannot_be_undone(project):
    with pytest.raises(UsageError, match="not made by"):
        undo(load_hybrid(project / "converted", dtype=torch.float32))


def test_the_number_of_configurations_must_be_that_of_the_layers():
    with pytest.raises(UsageError, match="3 mixer configurations for 4 layers"):
        swap(tiny_teacher(), [config_class("full_attention")()] * 3)


def test_the_seed_decides_the_new_parameters(project, tmp_path):
    other = convert(replace(plan(tiny_recipe(project)), seed=5), tmp_path / "other")
    first = load_hybrid(project / "converted", dtype=torch.float32).state_dict()
    second = load_hybrid(other, dtype=torch.float32).state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first if "scorer" in name)


def test_a_tied_head_may_be_stored_and_old_buffers_may_lie_beside(tmp_path):
    from safetensors.torch import load_file, save_file

    write_teacher(tmp_path)
    expected = logits(load_teacher(tmp_path / "teacher", dtype=torch.float32))
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, file, {"format": "pt"})
    plan(tiny_recipe(tmp_path))
    assert torch.equal(logits(load_teacher(tmp_path / "teacher", dtype=torch.float32)), expected)


def test_a_teacher_that_changed_since_the_plan_is_refused(tmp_path):
    write_teacher(tmp_path)
    made = plan(tiny_recipe(tmp_path))
    write_teacher(tmp_path, intermediate_size=40)
    with pytest.raises(CheckpointError, match="planned for"):
        convert(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_a_hybrid_is_found(project, tmp_path):
    out = convert(plan(tiny_recipe(project)), tmp_path / "out")
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_hybrid(out, dtype=torch.float32)


def test_layers_that_share_a_scorer_must_agree_on_it(project):
    recipe = tiny_recipe(project)
    shared = {"window_tokens": 14, "budget_tokens": 8, "scorer_sharing": "model"}
    mixers_by_name = {
        "A": MixerChoice("token_eviction", {**shared, "scorer_layers": 2}),
        "B": MixerChoice("token_eviction", shared),
    }
    with pytest.raises(RecipeError, match="same scorer settings"):
        plan(replace(recipe, mixers=mixers_by_name, layers=LayerPlan(pattern="F A F B")))


def test_the_read_back_goes_past_windows_and_budgets(project):
    prompts = export_module.check_prompts(plan(tiny_recipe(project)))
    assert max(map(len, prompts)) > 14 + 8
    assert prompts == export_module.check_prompts(plan(tiny_recipe(project)))


def test_a_padded_prompt_wants_its_mask_from_then_on(project):
    model = load_hybrid(project / "converted", dtype=torch.float32)
    mask = torch.ones_like(TOKENS)
    mask[0, :7] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(TOKENS, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UsageError, match="no attention mask says where"):
            model(TOKENS[:, :1], past_key_values=cache)
        longer = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), dim=1)
        model(TOKENS[:, :1], attention_mask=longer, past_key_values=cache)


def test_a_cache_goes_by_both_names(project):
    model = load_hybrid(project / "converted", dtype=torch.float32)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    mask = torch.ones_like(TOKENS)
    with torch.no_grad():
        for first, last in ((0, 5), (5, TOKENS.shape[1])):
            options = {"input_ids": TOKENS[:, first:last], "attention_mask": mask[:, :last]}
            one = model.model(**options, cache=caches[0]).last_hidden_state
            other = model.model(**options, past_key_values=caches[1]).last_hidden_state
            assert torch.equal(one, other)
        with pytest.raises(UsageError, match="two names of one argument"):
            model.model(TOKENS, cache=caches[0], past_key_values=caches[0])


def test_others_may_train_an_export_without_hybridize(exported):
    """The scores keep what they have learnt: their gradients are the package's own."""
    code = (
        "import sys, torch, warnings\nsys.modules['hybridize_kernels'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)\n"
        "model.train()\n"
        "ids = torch.arange(96)[None] % model.config.vocab_size\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    model(input_ids=ids, labels=ids).loss.backward()\n"
        "assert not any(name.split('.')[0] == 'hybridize' for name in sys.modules)\n"
        "learns = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()}\n"
        "print([name for name, does in learns.items() if not does and '.scorer.' not in name])\n"
        "print(sum('no scorer is trained' in str(w.message) for w in said) > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(exported)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "True"]
