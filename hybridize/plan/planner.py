"""Makes the plan: which layer gets which mixer. Reads config.json and tensor headers, never a weight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from hybridize.checkpoint import (
    CheckpointSource,
    read_config,
    resolve_source,
    sha256_bytes,
    source_fingerprint,
)
from hybridize.errors import FamilyError, RecipeError
from hybridize.families import AttentionGeometry, FamilyAdapter, family_of_config
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.configs.full_attention import FullAttentionConfig
from hybridize.mixers.registry import MIXERS, config_class
from hybridize.plan.bill import make_bill
from hybridize.plan.conversion_plan import ConversionPlan, Dtype
from hybridize.plan.weights import check_teacher_tensors
from hybridize.recipe.build import raise_problems
from hybridize.recipe.layers import choose_mixers
from hybridize.recipe.reader import build_config
from hybridize.recipe.schema import Recipe

CONTEXTS = (4096, 8192, 32768, 131072)
"""Context lengths, in tokens, at which the bill states the decoding memory."""
_DTYPES = ("float32", "bfloat16", "float16")
_WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf")


def plan(
    recipe: Recipe, *, offline: bool = False, weights: bool = True, contexts: Sequence[int] = CONTEXTS
) -> ConversionPlan:
    """Plans a conversion.

    Args:
        recipe: what the user wants.
        offline: take Hub files from the local cache only.
        weights: False plans a Hub model from its config.json without downloading the weights, whose headers then
            cannot be checked.
        contexts: context lengths, in tokens, for the state bytes.

    Raises:
        RecipeError: layers or mixers do not fit the model; every fault at once.
        CheckpointError: the checkpoint is missing, damaged, or not what its config.json says.
        FamilyError: the model is not one that can be converted.
    """
    source = resolve_source(recipe.model, offline=offline, weights=weights)
    config = read_config(source)
    if "hybridize" in config or str(config["model_type"]).startswith("hybridize_"):
        raise FamilyError(
            "this model is a hybrid already.", where=recipe.model, hint="Give the teacher that it was made from."
        )
    adapter, geometry = family_of_config(config)
    layers = _mixer_configs(recipe, geometry)
    warnings = _warnings(recipe, layers, geometry)
    fingerprint = _check_weights(source, adapter, geometry, config, warnings)
    stored, dtype = _stored_dtype(source, config), _dtype(recipe, source, config)
    return ConversionPlan(
        model=recipe.model,
        revision=source.revision,
        fingerprint=fingerprint,
        family=adapter.model_type,
        teacher_config=config,
        geometry=geometry,
        layers=layers,
        dtype=dtype,
        seed=recipe.seed,
        bill=make_bill(
            recipe,
            adapter,
            geometry,
            layers,
            dtype=dtype,
            contexts=contexts,
            source_bytes=0 if stored == dtype else source.size_bytes,
        ),
        warnings=tuple(warnings),
    )


def _mixer_configs(recipe: Recipe, geometry: AttentionGeometry) -> tuple[MixerConfig, ...]:
    choices = choose_mixers(recipe, geometry.num_layers, tuple(MIXERS))
    built: dict[str, MixerConfig] = {}
    problems: list[str] = []
    where = recipe.origin.where if recipe.origin else lambda key: "recipe"
    # Settings that no layer uses are checked too: a typing error in them would wait for the day they are used.
    unused = [(f"mixers.{name}", choice) for name, choice in recipe.mixers.items()]
    for key, choice in (*choices, *unused):
        name = f"{key}/{choice.mixer}"
        if name in built:
            continue
        try:
            built[name] = build_config(config_class(choice.mixer), choice.options, where=where(key), key=key)
        except RecipeError as error:
            built[name] = FullAttentionConfig()
            problems += error.problems or [f"{where(key)}: {key}.mixer: {error.what} {error.hint}"]
    layers = tuple(built[f"{key}/{choice.mixer}"] for key, choice in choices)
    misfits: dict[str, list[int]] = {}
    for index, config in enumerate(layers):
        for reason in config.misfits(geometry, index):
            misfits.setdefault(f"{config.name}: {reason}", []).append(index)
    problems += [f"{where('layers')}: layers {ranges(at)}: {reason}" for reason, at in misfits.items()]
    shared = {config.shared_over_layers for config in layers} - {None}
    if len(shared) > 1:
        problems.append(f"{where('mixers')}: mixers: layers that share a scorer must have the same scorer settings.")
    raise_problems(problems, where=where("layers"))
    return layers


def _warnings(recipe: Recipe, layers: Sequence[MixerConfig], geometry: AttentionGeometry) -> list[str]:
    """What the mixers have to say at the longest training length, or at the teacher's own, by layers."""
    lengths = [stage.sequence_tokens or 0 for stage in recipe.distill.stages] if recipe.distill else []
    if recipe.data is not None:
        lengths.append(recipe.data.sequence_tokens)
    context = max(lengths, default=0) or geometry.max_positions
    found: dict[str, list[int]] = {}
    for index, config in enumerate(layers):
        for warning in config.warnings(geometry, context) if context else ():
            found.setdefault(warning, []).append(index)
    warnings = [f"layers {ranges(at)}: {warning}" for warning, at in found.items()]
    if geometry.max_positions and context > geometry.max_positions:
        warnings.append(
            f"training sequences of {context} tokens are longer than the {geometry.max_positions} of the teacher."
        )
    if any(
        window and config.name != FullAttentionConfig.name
        for window, config in zip(geometry.windows, layers, strict=True)
    ):
        warnings.append("the teacher has a sliding window in layers that are converted; mixers do not keep to it.")
    return warnings


def _check_weights(
    source: CheckpointSource,
    adapter: FamilyAdapter,
    geometry: AttentionGeometry,
    config: Mapping[str, Any],
    warnings: list[str],
) -> str:
    """Compares the tensor headers with the model; returns the fingerprint."""
    if source.gguf_file is None and not any(path.name.endswith(_WEIGHT_ENDINGS) for path in source.path.iterdir()):
        warnings.append("the folder holds no weights, only config.json: the tensors could not be checked.")
        return sha256_bytes(json.dumps(config, sort_keys=True).encode())
    check_teacher_tensors(source, adapter, geometry)
    return source_fingerprint(source, headers_only=True)


def _dtype(recipe: Recipe, source: CheckpointSource, config: Mapping[str, Any]) -> Dtype:
    if recipe.dtype != "auto":
        return recipe.dtype
    stored = _stored_dtype(source, config)
    # A quantised file is expanded to float32: what it lost is lost, and nothing more.
    return cast(Dtype, stored) if stored in _DTYPES else "float32"


def _stored_dtype(source: CheckpointSource, config: Mapping[str, Any]) -> str:
    """What config.json says of the files; "" for GGUF, whose tensors are of many types."""
    if source.gguf_file is not None:
        return ""
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def ranges(indices: Sequence[int]) -> str:
    """ "0-3, 7" for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
