"""Makes transformers' Auto classes know the hybrids."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from hybridize.families import FAMILIES, family
from hybridize.model.modeling import hybrid_classes


def register() -> None:
    """After this call `AutoModelForCausalLM.from_pretrained` loads converted and exported folders of every family with
    the classes of this package, without remote code. Calling it again does nothing."""
    for model_type in FAMILIES:
        adapter = family(model_type)
        classes = hybrid_classes(adapter)
        AutoConfig.register(adapter.hybrid_model_type, classes.config, exist_ok=True)
        AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
