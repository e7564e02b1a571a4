"""Qwen2 and Qwen2.5: biases on q, k and v; an optional sliding window on the upper layers."""

from collections.abc import Mapping
from typing import Any

from hybridize.families.base import FamilyAdapter


class Qwen2Adapter(FamilyAdapter):
    model_type = "qwen2"
    transformers_module = "qwen2"
    config_class = "Qwen2Config"
    model_class = "Qwen2Model"
    causal_lm_class = "Qwen2ForCausalLM"

    def projection_bias(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool, bool]:
        return (True, True, True, False)

    def windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
        return windows_of_upper_layers(config, num_layers)


def windows_of_upper_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Qwen's rule: with `use_sliding_window`, layers from `max_window_layers` on have `sliding_window` tokens, unless
    `layer_types` says it layer by layer."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if window is None:
        return (None,) * num_layers
    layer_types = config.get("layer_types")
    if layer_types:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in layer_types)
    first = int(config.get("max_window_layers", 28))
    return tuple(int(window) if index >= first else None for index in range(num_layers))


ADAPTER = Qwen2Adapter()
