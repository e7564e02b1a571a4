"""The student: PEFT adapters on the old weights, new parameters and re-learnt projections trained in full.

What is trained is held in fp32 whatever the model's dtype; everything else is frozen. The result is an ordinary PEFT
adapter folder on top of the converted checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from hybridize.checkpoint import save_tensors
from hybridize.errors import RecipeError
from hybridize.mixers.base import NEW_PARAMETERS, Mixer
from hybridize.model.swap import mixers
from hybridize.recipe.schema import Lora

Group = Literal["mixers", "projections", "adapters"]
GROUPS: tuple[Group, ...] = ("mixers", "projections", "adapters")

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NO_LORA = "dummy-target-modules"  # PEFT's word for an adapter that holds nothing but modules_to_save


@dataclass(frozen=True)
class Student:
    """A hybrid with its adapters.

    Attributes:
        peft: the wrapped model; saving goes through it.
        model: the hybrid causal language model inside.
        mixers: (layer index, mixer), lowest layer first.
        groups: trained parameters by group and by name. "mixers": new parameters; "projections": projections trained
            in full; "adapters": LoRA.
        buffers: state of the mixers' controllers, by name.
    """

    peft: PeftModel
    model: Any
    mixers: tuple[tuple[int, Mixer], ...]
    groups: dict[Group, dict[str, nn.Parameter]]
    buffers: dict[str, Tensor]

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that some stage trains, by name."""
        return {name: parameter for group in GROUPS for name, parameter in self.groups[group].items()}

    def train_only(self, groups: tuple[Group, ...]) -> dict[Group, dict[str, nn.Parameter]]:
        """Freezes all but these groups; returns those of them that are not empty."""
        for group in GROUPS:
            for parameter in self.groups[group].values():
                parameter.requires_grad_(group in groups)
        return {group: self.groups[group] for group in groups if self.groups[group]}


def wrap(model: Any, lora: Lora | None, *, frozen_dtype: torch.dtype) -> Student:
    """Puts the adapters around a hybrid.

    Args:
        model: a hybrid as it was loaded.
        lora: settings of the low-rank adapters; None leaves the old weights frozen.
        frozen_dtype: the frozen weights are cast to it; what is trained becomes fp32 from the loaded values.

    Raises:
        RecipeError: the LoRA targets name no layer of the model.
    """
    found = mixers(model)
    shared = _shared_parts(found)
    config = LoraConfig(
        r=lora.rank if lora else 1,
        lora_alpha=lora.alpha if lora else 1,
        lora_dropout=lora.dropout if lora else 0.0,
        target_modules=_lora_targets(model, lora) if lora else _NO_LORA,
        modules_to_save=_modules_to_save(model) or None,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, config)
    for name, mixer, first in shared:  # PEFT gave each its own copy
        setattr(mixer.new.modules_to_save["default"], name, getattr(first.new.modules_to_save["default"], name))
    groups = _groups(peft)
    trained = {id(parameter) for group in groups.values() for parameter in group.values()}
    buffers = _controller_buffers(peft)
    for tensor in [*(p for p in peft.parameters() if id(p) in trained), *buffers.values()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for parameter in peft.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(frozen_dtype)
    return Student(peft, model, tuple(found), groups, buffers)


def with_present_tensors(student: Student) -> Student:
    """The student with the tensors that its modules hold by now: moving replaces buffers, sharding parameters."""
    return replace(student, groups=_groups(student.peft), buffers=_controller_buffers(student.peft))


def share_frozen_weights(student: Student, teacher: nn.Module) -> int:
    """Frozen parameters of the student that equal the teacher's become the teacher's too, so that they exist once.

    The teacher holds the very same parameter afterwards, wherever that is moved.

    Returns:
        bytes saved.
    """
    trained = {id(parameter) for parameter in student.trained().values()}
    named = student.peft.named_parameters()
    frozen = {plain_name(name): parameter for name, parameter in named if id(parameter) not in trained}
    shared: dict[int, nn.Parameter] = {}
    saved_bytes = 0
    for module_name, module in teacher.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            other = frozen.get(f"{module_name}.{name}" if module_name else name)
            if other is None or other is parameter:
                continue
            if id(parameter) not in shared and _equal(other, parameter):
                shared[id(parameter)] = other
                if other.data_ptr() != parameter.data_ptr():
                    saved_bytes += parameter.numel() * parameter.element_size()
            if id(parameter) in shared:  # under each of its names, as a head tied to the embedding
                setattr(module, name, shared[id(parameter)])
    return saved_bytes


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one.data, other.data)


def adapter_tensors(student: Student) -> dict[str, Tensor]:
    """What is trained, by PEFT's names; sharded where the student is."""
    return get_peft_model_state_dict(student.peft, save_embedding_layers=False)  # type: ignore[no-any-return]


def save_adapter(student: Student, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; equal weights give equal bytes.

    tensors: those of `adapter_tensors`, whole; None: they are.
    """
    tensors = adapter_tensors(student) if tensors is None else tensors
    save_tensors(folder, tensors, stem="adapter_model", max_shard_bytes=float("inf"))
    config = student.peft.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True}  # beside the run's converted/, not at a path
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def plain_name(name: str) -> str:
    """The name that a parameter has without PEFT: `base_model.model.a.base_layer.weight` -> `a.weight`."""
    for part in (".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")


def _mixer_names(model: nn.Module) -> dict[str, Mixer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Mixer)}


def _modules_to_save(model: nn.Module) -> list[str]:
    named = _mixer_names(model)
    names = [NEW_PARAMETERS] if any(mixer.new is not None for mixer in named.values()) else []
    for name, mixer in named.items():
        if not mixer.config.keeps_projections:
            names += [f"{name}.{projection}" for projection in _PROJECTIONS]
    return names


def _lora_targets(model: nn.Module, lora: Lora) -> list[str]:
    """Full names of the linear layers that get an adapter: a suffix would also meet the mixers' new modules."""
    left_out = tuple(
        f"{name}." if not mixer.config.keeps_projections else f"{name}.{NEW_PARAMETERS}."
        for name, mixer in _mixer_names(model).items()
    )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.rsplit(".", 1)[-1] in lora.targets and not name.startswith(left_out)]
    if not targets:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear if not name.startswith(left_out)})
        hint = f"The model's linear layers are: {', '.join(known)}."
        raise RecipeError("No layer of the model has these names.", where="distill.lora.targets", hint=hint)
    return targets


def _shared_parts(found: list[tuple[int, Mixer]]) -> list[tuple[str, Mixer, Mixer]]:
    """(name, mixer, first holder) of the parts of new parameters that a mixer shares with an earlier one."""
    first_holder: dict[int, Mixer] = {}
    shared = []
    for _, mixer in found:
        for name, part in mixer.new.named_children() if mixer.new is not None else ():
            first = first_holder.setdefault(id(part), mixer)
            if first is not mixer:
                shared.append((name, mixer, first))
    return shared


def _groups(peft: PeftModel) -> dict[Group, dict[str, nn.Parameter]]:
    groups: dict[Group, dict[str, nn.Parameter]] = {group: {} for group in GROUPS}
    for name, parameter in peft.named_parameters():
        if f".{NEW_PARAMETERS}.modules_to_save." in name:
            groups["mixers"][name] = parameter
        elif ".modules_to_save." in name:
            groups["projections"][name] = parameter
        elif ".lora_" in name:
            groups["adapters"][name] = parameter
    return groups


def _controller_buffers(peft: PeftModel) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in peft.named_buffers() if f".{NEW_PARAMETERS}.modules_to_save." in name}
