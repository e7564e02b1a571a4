"""What a process of two holds of sharded models. The other process is not there: its parts are never looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hybridize.distillation.lora import Student, wrap
from hybridize.distillation.run import prepare_pair
from hybridize.distillation.sharding import Sharding, gathered_bytes, keep_gathered, own_part
from hybridize.distillation.teacher import Teacher
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from hybridize.recipe.schema import Lora
from tests.tiny import tiny_teacher, tiny_tokens

LAYERS: tuple[dict[str, Any], ...] = (
    {"mixer": "full_attention"},
    {"mixer": "token_eviction", "window_tokens": 14, "sink_tokens": 2, "budget_tokens": 8},
    {"mixer": "gated_delta_net"},
    {"mixer": "sliding_window", "window_tokens": 14},
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_processes() -> Iterator[None]:
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


def sharded_pair(*, share: bool = True, reshard_after_forward: bool = True) -> tuple[Student, Teacher]:
    hybrid = swap(tiny_teacher(), [config_from_dict(dict(layer)) for layer in LAYERS])
    student, teacher = wrap(hybrid, Lora(rank=2), frozen_dtype=torch.float32), Teacher(tiny_teacher())
    sharding = Sharding("cpu", reshard_after_forward)
    return prepare_pair(student, teacher, share=share, device=CPU, sharding=sharding)


def memory_of_layers(*models: Any) -> int:
    """Bytes that this process holds of the parameters of the decoder layers, each place once."""
    storages = {
        (storage := own_part(parameter.data).untyped_storage()).data_ptr(): storage.nbytes()
        for model in models
        for parameter in model.model.layers.parameters()
    }
    return sum(storages.values())


def test_frozen_weights_exist_once_in_each_process() -> None:
    student, teacher = sharded_pair()
    held = set(student.model.model.layers.parameters())
    common = [parameter for parameter in teacher.model.model.layers.parameters() if parameter in held]
    assert all(isinstance(parameter, DTensor) for parameter in common)
    # All but what the gated delta net trains in full: its four projections.
    names = dict(teacher.model.model.layers.named_parameters())
    own = {name.removesuffix(".weight") for name, parameter in names.items() if parameter not in held}
    assert own == {f"2.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    alone = sharded_pair(share=False)
    shared_bytes = sum(own_part(parameter).nbytes for parameter in common)
    assert memory_of_layers(student.model, teacher.model) == pytest.approx(
        memory_of_layers(alone[0].model, alone[1].model) - shared_bytes, rel=0.01
    )


def test_teacher_gathers_the_weights_in_common() -> None:
    student, teacher = sharded_pair()
    weight = teacher.model.model.layers[0].mlp.up_proj.weight
    assert weight is student.model.model.layers[0].mlp.up_proj.base_layer.weight
    with torch.no_grad():
        own_part(weight).fill_(0.5)
    layer = teacher.model.model.layers[0]
    layer.unshard()
    half = own_part(weight).size(0)
    assert torch.equal(layer.mlp.up_proj.weight[:half], torch.full_like(layer.mlp.up_proj.weight[:half], 0.5))
    layer.reshard()


def test_originals_of_what_is_trained_in_full_are_not_gathered() -> None:
    student, _ = sharded_pair()
    assert not [name for name, _ in student.peft.named_parameters() if "original_module" in name]
    assert any(".modules_to_save." in name for name, _ in student.peft.named_parameters())


@pytest.mark.parametrize("kept", [False, True])
def test_gathered_weights_are_kept_where_wanted(kept: bool) -> None:
    student, teacher = sharded_pair()
    keep_gathered(student.model, kept)
    before = gathered_bytes(student.model)
    whole = sum(parameter.nbytes for parameter in student.model.model.layers.parameters())
    assert before == pytest.approx(whole / 2, rel=0.05)  # a few parameters stay whole
    for model in (student.model, teacher.model):
        model.model(input_ids=tiny_tokens(), use_cache=False)
    assert gathered_bytes(student.model) == (0 if kept else before)
    assert gathered_bytes(teacher.model) > 0  # a teacher has no backward pass
    keep_gathered(student.model, False)


def test_launcher_may_keep_everything() -> None:
    student, _ = sharded_pair(reshard_after_forward=False)
    student.model.model(input_ids=tiny_tokens(), use_cache=False)
    assert gathered_bytes(student.model) == 0
