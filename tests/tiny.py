"""Tiny random teachers, one a family: what every test that needs a model builds on."""

from __future__ import annotations

from typing import Any

import torch

from hybridize.families import FAMILIES, family

VOCABULARY = 96

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

FAMILY_NAMES = tuple(FAMILIES)


def tiny_config(model_type: str = "llama", **changes: Any) -> Any:
    """A transformers configuration of a few thousand parameters.

    Llama has tied embeddings (as SmolLM2 has), Qwen3 a head size that is not hidden_size / heads, Qwen2 its biases.
    """
    values = dict(_SIZES)
    if model_type == "llama":
        values["tie_word_embeddings"] = True
    if model_type == "mistral":
        values["sliding_window"] = None
    if model_type == "qwen3":
        values["head_dim"] = 16
    if model_type == "qwen2":
        values["hidden_size"] = 32
        values.pop("head_dim")
    values.update(changes)
    config_class, _, _ = family(model_type).base_classes()
    return config_class(**values)


def tiny_teacher(model_type: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model of the family, in eval mode and fp32, with weights large enough that attention matters."""
    torch.manual_seed(seed)
    _, _, causal_lm = family(model_type).base_classes()
    model = causal_lm(tiny_config(model_type, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.7, 1.3)
    return model


def tiny_tokens(batch: int = 2, tokens: int = 40, seed: int = 1) -> torch.Tensor:
    """[batch, tokens] random token ids that avoid the special ones."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
