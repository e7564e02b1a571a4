"""What a conversion costs, from sizes alone: parameters, disk, memory, training tokens, decoding state."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.families import AttentionGeometry, FamilyAdapter
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.configs.full_attention import FullAttentionConfig
from hybridize.recipe.schema import Data, Recipe, Stage

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATE_ELEMENT_BYTES = 2
"""State bytes are stated for bfloat16 keys and values."""
_TRAINED_BYTES = 4 + 4 + 4
"""A trained parameter in a run checkpoint: its value and two Adam moments, all float32."""
_SMALL_VOCABULARY = 2**16
"""Of so many tokens the ids in a teacher cache take two bytes each, of more four."""
_PROGRAM_BYTES = 450 * 2**20
"""What Python, torch and transformers take before any weight is loaded (measured: 400 MiB)."""


@dataclass(frozen=True)
class Bill:
    """Costs.

    Attributes:
        teacher_parameters: of the teacher, tied weights counted once.
        new_parameters: that the mixers add.
        trained_parameters: in the largest stage: new, projections trained in full, and adapters.
        checkpoint_bytes: the converted folder's weights.
        disk_bytes: everything a whole run writes: converted folder, run checkpoints, teacher cache, export.
        convert_memory_bytes: host memory at the peak of `convert`.
        train_tokens: tokens of all stages, on one process.
        state_bytes: decoding state of one sequence by context length, of student and teacher.
    """

    teacher_parameters: int
    new_parameters: int
    trained_parameters: int
    checkpoint_bytes: int
    disk_bytes: int
    convert_memory_bytes: int
    train_tokens: int
    state_bytes: Mapping[int, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """Plain data; context lengths become text, as JSON wants keys to be."""
        state = {str(context): dict(by_model) for context, by_model in self.state_bytes.items()}
        return {**self.__dict__, "state_bytes": state}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Bill:
        """The inverse of `to_json`."""
        state = {int(context): dict(by_model) for context, by_model in values["state_bytes"].items()}
        return cls(**{**values, "state_bytes": state})


def make_bill(
    recipe: Recipe,
    adapter: FamilyAdapter,
    geometry: AttentionGeometry,
    layers: Sequence[MixerConfig],
    *,
    dtype: str,
    contexts: Sequence[int],
    source_bytes: int = 0,
) -> Bill:
    """The bill of converting a model of these sizes into `layers`, and of the recipe's stages.

    Args:
        dtype: of the converted weights.
        contexts: lengths, in tokens, for the state bytes.
        source_bytes: of the teacher's files, if they are held in memory beside the converted weights.
    """
    shapes = adapter.tensor_shapes(geometry)
    teacher = sum(math.prod(shape) for shape in shapes.values())
    new = _new_parameters(layers, geometry)
    trained = new + _trained_teacher_parameters(recipe, shapes, layers)
    element_bytes = ELEMENT_BYTES[dtype]
    checkpoint_bytes = (teacher + new) * element_bytes
    export_bytes = (teacher + new) * ELEMENT_BYTES[recipe.export.dtype]
    run_bytes = 0
    if recipe.distill is not None:
        # One more than is kept: the newest is whole before the oldest goes.
        run_bytes = trained * _TRAINED_BYTES * (recipe.distill.keep_checkpoints + 1) + trained * 4
        run_bytes += _cache_bytes(recipe, geometry, sum(config.name != "full_attention" for config in layers))
    return Bill(
        teacher_parameters=teacher,
        new_parameters=new,
        trained_parameters=trained,
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=checkpoint_bytes + run_bytes + export_bytes,
        # Measured on SmolLM2-135M: the model once, and the file beside it when its numbers change their type.
        convert_memory_bytes=checkpoint_bytes + source_bytes + _PROGRAM_BYTES,
        train_tokens=_train_tokens(recipe),
        state_bytes={context: state_bytes(layers, geometry, context) for context in contexts},
    )


def _new_parameters(layers: Sequence[MixerConfig], geometry: AttentionGeometry) -> int:
    shared: dict[Hashable, int] = {}
    total = 0
    for config in layers:
        count = config.new_parameters(geometry)
        if config.shared_over_layers is not None:  # counted once, whatever window each layer has
            shared[config.shared_over_layers] = count
        else:
            total += count
    return total + sum(shared.values())


def _trained_teacher_parameters(
    recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], layers: Sequence[MixerConfig]
) -> int:
    """Projections that a mixer trains in full, and LoRA matrices on the others."""
    if recipe.distill is None:
        return 0
    lora = recipe.distill.lora
    total = 0
    for name, shape in shapes.items():
        if not name.startswith("model.layers.") or len(shape) != 2:
            continue
        parts = name.split(".")
        in_full = parts[3] == "self_attn" and not layers[int(parts[2])].keeps_projections
        if in_full:
            total += math.prod(shape)
        elif lora is not None and parts[-2] in lora.targets:
            total += lora.rank * sum(shape)
    return total


def _cache_bytes(recipe: Recipe, geometry: AttentionGeometry, num_converted: int) -> int:
    """Of a teacher cache, if nothing is in it yet and no text comes twice."""
    if recipe.distill is None or recipe.data is None or recipe.distill.teacher_cache is None:
        return 0
    cache, total = recipe.distill.teacher_cache, 0
    top_k = min(cache.top_k, geometry.vocab_size)
    id_bytes = 2 if geometry.vocab_size <= _SMALL_VOCABULARY else 4
    for stage in recipe.distill.stages:
        tokens = _stage_tokens(stage, recipe.data)
        if stage.kind != "align":
            total += tokens * ((id_bytes + 2) * top_k + 4)
        elif cache.layer_inputs:
            total += tokens // stage.passes * num_converted * geometry.hidden_size * STATE_ELEMENT_BYTES
    return total


def _train_tokens(recipe: Recipe) -> int:
    if recipe.distill is None or recipe.data is None:
        return 0
    return sum(_stage_tokens(stage, recipe.data) for stage in recipe.distill.stages)


def _stage_tokens(stage: Stage, data: Data) -> int:
    length = stage.sequence_tokens or data.sequence_tokens
    return stage.steps * stage.batch_sequences * stage.accumulate * length


def state_bytes(layers: Sequence[MixerConfig], geometry: AttentionGeometry, context: int) -> dict[str, int]:
    """Of one sequence after `context` tokens; layers with a window of the teacher's own hold no more than that."""
    full = FullAttentionConfig()
    teacher = student = 0
    for window, config in zip(geometry.windows, layers, strict=True):
        own = full.state_bytes(geometry, min(context, window or context), STATE_ELEMENT_BYTES)
        teacher += own
        student += own if config == full else config.state_bytes(geometry, context, STATE_ELEMENT_BYTES)
    return {"student": student, "teacher": teacher}
