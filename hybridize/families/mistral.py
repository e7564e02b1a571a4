"""Mistral (dense): Llama with one sliding window for all layers in its first release, none since."""

from collections.abc import Mapping
from typing import Any

from hybridize.families.base import FamilyAdapter


class MistralAdapter(FamilyAdapter):
    model_type = "mistral"
    transformers_module = "mistral"
    config_class = "MistralConfig"
    model_class = "MistralModel"
    causal_lm_class = "MistralForCausalLM"

    def projection_bias(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool, bool]:
        return (False, False, False, False)

    def windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
        window = config.get("sliding_window")
        return (int(window) if window else None,) * num_layers


ADAPTER = MistralAdapter()
