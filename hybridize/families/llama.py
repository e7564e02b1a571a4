"""Llama 2, 3.x, SmolLM, SmolLM2 and other models published as `llama`."""

from hybridize.families.base import FamilyAdapter


class LlamaAdapter(FamilyAdapter):
    model_type = "llama"
    transformers_module = "llama"
    config_class = "LlamaConfig"
    model_class = "LlamaModel"
    causal_lm_class = "LlamaForCausalLM"


ADAPTER = LlamaAdapter()
