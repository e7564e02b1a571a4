"""What decoding costs in memory: promised over context lengths, and measured after a short prefill."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from hybridize.evaluation.generation import cache_of
from hybridize.families import AttentionGeometry, family
from hybridize.mixers.base import MixerState
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.configs.full_attention import FullAttentionConfig
from hybridize.model.modeling import mixer_configs

ELEMENT_BYTES = 2
"""bf16, the type that deployed models decode in; what a mixer keeps in another type is counted in that type."""
PREFILL_TOKENS = 256
_SHORTEST_CONTEXT = 1024
_DOUBLINGS = 4


def state_bytes(models: dict[str, Any], *, context_tokens: int, seed: int) -> dict[str, Any]:
    """State bytes of one sequence for student and teacher (full attention in every layer).

    Args:
        models: "student" and, where there is one, "teacher"; their caches are measured.
        context_tokens: the length that the headline numbers are for.

    Returns:
        student, teacher, ratio and tokens for the headline; "by_context" with rows {"tokens", "student", "teacher"};
        "layers" with rows {"index", "mixer", "student", "teacher"}; "measured" with, for each model, the promised and
        the measured bytes after a prefill of a few hundred random tokens, in the type the model runs in.
    """
    config = models["student"].config
    geometry = family(config.model_type).geometry(config.to_dict())
    configs = layer_configs(config, geometry)
    teacher: list[MixerConfig] = [FullAttentionConfig()] * geometry.num_layers
    lengths = {context_tokens << n for n in range(_DOUBLINGS + 1)}
    shorter = context_tokens
    while (shorter := shorter // 2) >= _SHORTEST_CONTEXT:
        lengths.add(shorter)

    student_layers = bytes_by_layer(configs, geometry, context_tokens, ELEMENT_BYTES)
    teacher_layers = bytes_by_layer(teacher, geometry, context_tokens, ELEMENT_BYTES)
    return {
        "tokens": context_tokens,
        "element_bytes": ELEMENT_BYTES,
        "student": sum(student_layers),
        "teacher": sum(teacher_layers),
        "ratio": sum(student_layers) / sum(teacher_layers),
        "by_context": [
            {
                "tokens": tokens,
                "student": sum(bytes_by_layer(configs, geometry, tokens, ELEMENT_BYTES)),
                "teacher": sum(bytes_by_layer(teacher, geometry, tokens, ELEMENT_BYTES)),
            }
            for tokens in sorted(lengths)
        ],
        "layers": [
            {"index": i, "mixer": mixer.name, "student": ours, "teacher": theirs}
            for i, (mixer, ours, theirs) in enumerate(zip(configs, student_layers, teacher_layers, strict=True))
        ],
        "measured": {name: _measure(model, seed) for name, model in models.items()},
    }


def layer_configs(config: Any, geometry: AttentionGeometry) -> list[MixerConfig]:
    """The mixer configuration of every layer; full attention where the model's configuration names no mixer."""
    block = getattr(config, "hybridize", None)
    swapped = mixer_configs(block) if block else {}
    return [swapped.get(index, FullAttentionConfig()) for index in range(geometry.num_layers)]


def bytes_by_layer(
    configs: Sequence[MixerConfig], geometry: AttentionGeometry, tokens: int, element_bytes: int
) -> list[int]:
    """State bytes of every layer after `tokens`; a kept layer that has a window of its own keeps no more than that."""
    sizes = []
    for mixer, window in zip(configs, geometry.windows, strict=True):
        kept = min(tokens, window) if window is not None and isinstance(mixer, FullAttentionConfig) else tokens
        sizes.append(mixer.state_bytes(geometry, kept, element_bytes))
    return sizes


def _measure(model: Any, seed: int) -> dict[str, Any]:
    geometry = family(model.config.model_type).geometry(model.config.to_dict())
    configs = layer_configs(model.config, geometry)
    element_bytes = model.dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(geometry.vocab_size, (1, PREFILL_TOKENS), generator=generator).to(model.device)
    with torch.inference_mode():
        outputs = model.model(input_ids=tokens, use_cache=True)
    promised = sum(bytes_by_layer(configs, geometry, PREFILL_TOKENS, element_bytes))
    measured = sum(layer_bytes(layer) for layer in cache_of(outputs).layers)
    row = _Measured(PREFILL_TOKENS, element_bytes, promised, measured, promised == measured)
    return dataclasses.asdict(row)


@dataclasses.dataclass(frozen=True)
class _Measured:
    tokens: int
    element_bytes: int
    promised: int
    measured: int
    as_promised: bool


def layer_bytes(layer: Any) -> int:
    """Bytes that one layer of a cache holds for each sequence."""
    if isinstance(layer, MixerState):
        return layer.bytes_per_sequence()
    return sum(t.numel() * t.element_size() // t.shape[0] for t in (layer.keys, layer.values))
