"""Qwen3 (dense): RMSNorm on every query and key head before RoPE; the head size is independent of the width."""

from collections.abc import Mapping
from typing import Any

from hybridize.families.base import FamilyAdapter
from hybridize.families.qwen2 import windows_of_upper_layers


class Qwen3Adapter(FamilyAdapter):
    model_type = "qwen3"
    transformers_module = "qwen3"
    config_class = "Qwen3Config"
    model_class = "Qwen3Model"
    causal_lm_class = "Qwen3ForCausalLM"
    qk_norm = True

    def windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
        return windows_of_upper_layers(config, num_layers)


ADAPTER = Qwen3Adapter()
