"""What is trained and what is not, what the adapter holds, and what each stage teaches."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from hybridize.distillation.data import Batch
from hybridize.distillation.lora import Student, plain_name, save_adapter, share_frozen_weights, wrap
from hybridize.distillation.stages import Align, Distil, make_step
from hybridize.distillation.teacher import Teacher
from hybridize.errors import RecipeError
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.registry import config_from_dict
from hybridize.model import training_form
from hybridize.model.swap import mixers, swap
from hybridize.recipe.schema import Lora, Loss, Stage
from tests.tiny import tiny_teacher, tiny_tokens

EVICTION = {"mixer": "token_eviction", "window_tokens": 14, "sink_tokens": 2, "budget_tokens": 8}


def configs(*layers: str, **eviction: Any) -> list[MixerConfig]:
    """Configurations by letter: F, S, T, G."""
    options: dict[str, dict[str, Any]] = {
        "F": {"mixer": "full_attention"},
        "S": {"mixer": "sliding_window", "window_tokens": 8, "sink_tokens": 1},
        "T": EVICTION | eviction,
        "G": {"mixer": "gated_delta_net"},
    }
    return [config_from_dict(options[letter]) for letter in layers]


LORA = Lora(rank=2)


def student(*layers: str, lora: Lora | None = LORA, dtype: torch.dtype = torch.float32, **eviction: Any) -> Student:
    return wrap(swap(tiny_teacher().to(dtype), configs(*layers, **eviction)), lora, frozen_dtype=dtype)


def test_groups_hold_new_parameters_full_projections_and_adapters() -> None:
    wrapped = student("F", "T", "G", "S")
    projections = {plain_name(name) for name in wrapped.groups["projections"]}
    assert projections == {f"model.layers.2.self_attn.{p}_proj.weight" for p in "qkvo"}
    assert {plain_name(name).split(".")[2] for name in wrapped.groups["mixers"]} == {"1", "2"}
    adapted = {plain_name(name).split(".lora_")[0] for name in wrapped.groups["adapters"]}
    attention = {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 3) for p in "qkvo"}
    mlp = {f"model.layers.{i}.mlp.{p}_proj" for i in range(4) for p in ("gate", "up", "down")}
    assert adapted == attention | mlp
    trained = {id(parameter) for parameter in wrapped.trained().values()}
    assert all(parameter.requires_grad == (id(parameter) in trained) for parameter in wrapped.peft.parameters())


def test_wrapping_changes_no_logit() -> None:
    model = swap(tiny_teacher(), configs("F", "T", "G", "S"))
    tokens = tiny_tokens()
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        assert torch.equal(wrap(model, Lora(rank=2), frozen_dtype=torch.float32).model(input_ids=tokens).logits, before)


def test_without_lora_only_mixers_are_trained() -> None:
    wrapped = student("F", "T", "G", "S", lora=None)
    assert not wrapped.groups["adapters"]
    assert wrapped.groups["mixers"]


def test_trained_weights_are_float32_and_frozen_ones_are_not() -> None:
    wrapped = student("F", "T", "G", "S", dtype=torch.bfloat16)
    assert {p.dtype for p in wrapped.trained().values()} == {torch.float32}
    assert {p.dtype for p in wrapped.peft.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_unknown_lora_target_lists_the_known() -> None:
    with pytest.raises(RecipeError, match=r"down_proj.*q_proj"):
        student("F", "T", "G", "S", lora=Lora(targets=("query",)))


def test_frozen_weights_exist_once() -> None:
    teacher = tiny_teacher()
    wrapped = student("F", "T", "G", "S")
    saved_bytes = share_frozen_weights(wrapped, teacher)
    of_teacher = {parameter.data_ptr() for parameter in teacher.parameters()}
    frozen = [p for p in wrapped.peft.parameters() if not p.requires_grad]
    assert sum(p.nbytes for p in frozen if p.data_ptr() in of_teacher) == saved_bytes
    assert saved_bytes > 0.9 * sum(p.nbytes for p in teacher.parameters())
    assert not any(p.data_ptr() in of_teacher for p in wrapped.trained().values())


@pytest.mark.parametrize("layers", ["FTGS", "TTFT"])
@pytest.mark.parametrize("lora", [LORA, None])
def test_adapter_on_a_fresh_hybrid_gives_the_student(tmp_path: Path, lora: Lora | None, layers: str) -> None:
    wrapped = student(*layers, lora=lora, scorer_sharing="model")
    with torch.no_grad():
        for parameter in wrapped.trained().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        save_adapter(wrapped, folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokens = tiny_tokens()
    fresh = swap(tiny_teacher(), configs(*layers, scorer_sharing="model"))
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "a")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, wrapped.model.eval()(input_ids=tokens).logits)
        expected = wrapped.model.double()(input_ids=tokens).logits
        merged = loaded.double().merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, atol=1e-4, rtol=0)


def test_shared_scorer_stays_one() -> None:
    wrapped = student("T", "T", "F", "T", scorer_sharing="model")
    assert len({id(mixer.new.scorer) for _, mixer in wrapped.mixers}) == 1
    assert len({id(mixer.new.controller) for _, mixer in wrapped.mixers}) == 3
    assert {plain_name(name).split(".")[2] for name in wrapped.groups["mixers"]} == {"0"}


def test_teacher_trace_is_what_the_layer_saw() -> None:
    teacher = Teacher(tiny_teacher())
    tokens = tiny_tokens()
    traces = teacher.trace(Batch(tokens, ()), (1, 2))
    assert sorted(traces) == [1, 2]
    attention = teacher.model.model.layers[1].self_attn
    with torch.no_grad():
        again, _ = attention(
            traces[1].hidden_states, position_embeddings=traces[1].position_embeddings, attention_mask=None
        )
    torch.testing.assert_close(again, traces[1].output)
    assert not any(module._forward_hooks for module in teacher.model.modules())


def align(*layers: str, **eviction: Any) -> tuple[Align, Student]:
    wrapped = student(*layers, **eviction)
    stage = Stage("a", "align", steps=2)
    step = make_step(stage, wrapped, Teacher(tiny_teacher()), nullcontext())  # type: ignore[arg-type]
    assert isinstance(step, Align)
    return step, wrapped


def batch(tokens: int = 40) -> Batch:
    return Batch(tiny_tokens(2, tokens), ("a", "b"))


def test_align_trains_mixers_alone_and_each_from_its_own_layer() -> None:
    step, wrapped = align("F", "T", "G", "S")
    wrapped.model.train()
    measured = step.backward(step.prepare(batch()), 1.0, measure=True)
    assert {name for name in measured if name.startswith("layer_")} == {"layer_1", "layer_2"}
    with_gradient = {name for name, parameter in wrapped.trained().items() if parameter.grad is not None}
    assert with_gradient <= {*wrapped.groups["mixers"], *wrapped.groups["projections"]}
    assert {plain_name(name).split(".")[2] for name in with_gradient} == {"1", "2"}
    alone = measured["layer_2"]
    with torch.no_grad():
        for parameter in dict(wrapped.mixers)[1].parameters():
            parameter.mul_(1.7)
    assert torch.equal(step.backward(step.prepare(batch()), 1.0, measure=True)["layer_2"], alone)


def test_align_of_a_window_as_long_as_the_text_has_no_error() -> None:
    step, wrapped = align("F", "T", "G", "S", window_tokens=64)
    wrapped.model.train()
    assert step.backward(step.prepare(batch()), 1.0, measure=True)["layer_1"] < 1e-9


def test_align_clips_each_layer_alone() -> None:
    step, wrapped = align("F", "T", "G", "T")
    groups = step.clip_groups()
    assert len(groups) == 3
    assert sum(len(group) for group in groups) == sum(p.requires_grad for p in wrapped.peft.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distil_reaches_every_group(checkpointing: bool) -> None:
    wrapped = student("F", "T", "G", "S")
    stage = Stage("d", "distill", steps=2, loss=Loss(hidden=0.5, cross_entropy=0.5))
    step = make_step(stage, wrapped, Teacher(tiny_teacher()), nullcontext())  # type: ignore[arg-type]
    assert isinstance(step, Distil)
    wrapped.model.train()
    if checkpointing:
        training_form.enter(wrapped.model)
        training_form.checkpointed(wrapped.model, range(4))
    measured = step.backward(step.prepare(batch()), 0.5, measure=True)
    of_eviction = {"eviction_budget", "retention_target"}
    assert {"loss", "kl", "agreement", "hidden", "cross_entropy"} | of_eviction == set(measured)
    for group in ("mixers", "projections", "adapters"):
        assert any(p.grad is not None and bool(p.grad.any()) for p in wrapped.groups[group].values()), group
    assert all(p.grad is None for p in wrapped.peft.parameters() if not p.requires_grad)


def test_unconverted_student_agrees_with_its_teacher() -> None:
    wrapped = student("F", "F", "F", "F")
    stage = Stage("d", "distill", steps=2)
    step = make_step(stage, wrapped, Teacher(tiny_teacher()), nullcontext())  # type: ignore[arg-type]
    measured = step.backward(step.prepare(batch()), 1.0, measure=True)
    assert measured["agreement"] == 1
    assert abs(float(measured["kl"])) < 1e-6


def test_mixers_of_a_wrapped_model_are_found() -> None:
    wrapped = student("F", "T", "G", "S")
    assert [index for index, _ in mixers(wrapped.peft)] == [1, 2, 3]


def test_align_takes_targets_once_and_measures_eviction_layers_when_asked() -> None:
    wrapped = student("F", "T", "G", "T")
    stage = Stage("a", "align", steps=2, passes=2)
    step = make_step(stage, wrapped, Teacher(tiny_teacher()), nullcontext())  # type: ignore[arg-type]
    wrapped.model.train()
    prepared = step.prepare(batch())
    first = step.backward(prepared, 1.0, measure=False)
    assert {name for name in first if name.startswith("layer_")} == {"layer_2"}
    targets = prepared[1].targets
    again = step.backward(prepared, 1.0, measure=True)
    assert prepared[1].targets is targets
    assert {"layer_1", "layer_2", "layer_3", "error"} <= set(again)
    assert wrapped.model.training


def test_losses_of_the_mixers_are_averaged_over_the_layers() -> None:
    wrapped = student("F", "T", "F", "T")
    for weight, (_, mixer) in zip((1.0, 3.0), [(i, m) for i, m in wrapped.mixers if m.new is not None], strict=True):
        for name, buffer in wrapped.buffers.items():
            if name.endswith("l1_weight") and f".layers.{mixer.layer_idx}." in name:
                buffer.fill_(weight)
    stage = Stage("d", "distill", steps=2)
    step = make_step(stage, wrapped, Teacher(tiny_teacher()), nullcontext())  # type: ignore[arg-type]
    wrapped.model.train()
    measured = step.backward(step.prepare(batch()), 1.0, measure=False)
    found = [float(mixer.auxiliary["eviction_budget"].detach()) for _, mixer in wrapped.mixers if mixer.auxiliary]
    assert len(found) == 2
    assert min(found) > 0
    assert float(measured["eviction_budget"]) == pytest.approx(sum(found) / 2)


def test_measuring_leaves_the_gradient_and_the_losses_of_align_as_they_are() -> None:
    found = []
    for measure in (False, True):
        torch.manual_seed(0)
        step, wrapped = align("F", "T", "F", "T", budget_tokens=2, l1_every_steps=1)
        wrapped.model.train()
        for name, buffer in wrapped.buffers.items():
            if name.endswith("l1_weight"):
                buffer.fill_(3.0)
        torch.manual_seed(1)
        measured = step.backward(step.prepare(batch()), 1.0, measure=measure)
        gradients = {name: p.grad for name, p in wrapped.trained().items() if p.grad is not None}
        found.append((measured, gradients))
    (without, plain), (with_error, measured_too) = found
    assert float(without["eviction_budget"]) > 0
    assert "error" in with_error
    assert "error" not in without
    assert all(torch.equal(without[name], with_error[name]) for name in without)
    assert plain.keys() == measured_too.keys()
    assert all(torch.equal(plain[name], measured_too[name]) for name in plain)


def test_no_graph_of_a_recomputed_layer_outlives_the_backward_pass() -> None:
    wrapped = student("F", "T", "F", "T")
    training_form.enter(wrapped.model)
    training_form.checkpointed(wrapped.model, range(4))
    step = make_step(Stage("d", "distill", steps=2), wrapped, Teacher(tiny_teacher()), nullcontext())  # type: ignore[arg-type]
    wrapped.model.train()
    step.backward(step.prepare(batch()), 1.0, measure=False)
    losses = [value for _, mixer in wrapped.mixers for value in mixer.auxiliary.values()]
    assert losses
    assert all(value.grad_fn is None for value in losses)
