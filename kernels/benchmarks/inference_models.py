"""Teachers of true sizes with random weights, and the hybrids that inference is measured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from benchmarks.distillation_models import MODELS as LLAMA_MODELS
from hybridize.families import family
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.registry import MIXERS, config_class
from hybridize.model.swap import swap
from hybridize.recipe.layers import choose_mixers
from hybridize.recipe.reader import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MODELS: dict[str, Any] = {
    **LLAMA_MODELS,
    "qwen3-1.7b": Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
}
_TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
"""Besides the depth, which the recipes' layers are numbered by."""


@dataclass(frozen=True)
class Hybrid:
    """A hybrid's name, and the mixer of each of a model's layers."""

    name: str
    layers: Callable[[int], Sequence[MixerConfig]]


def of_recipe(name: str) -> Callable[[int], list[MixerConfig]]:
    """The layers of a recipe that comes with hybridize."""

    def layers(count: int) -> list[MixerConfig]:
        recipe = load_recipe(RECIPES / f"{name}.yaml", mixer_configs=config_class)
        choices = choose_mixers(recipe, count, tuple(MIXERS))
        return [config_class(choice.mixer)(**choice.options) for _, choice in choices]

    return layers


def half_linear(count: int) -> list[MixerConfig]:
    """Token eviction, 512 tokens of the window and 512 retained, and gated delta net in turn."""
    eviction = config_class("token_eviction")(window_tokens=512, budget_tokens=512)  # type: ignore[call-arg]
    return [eviction if index % 2 == 0 else config_class("gated_delta_net")() for index in range(count)]


LTE = Hybrid("hybrid, all token eviction", of_recipe("smollm2-135m--lte"))
LALTE = Hybrid("hybrid, half linear", of_recipe("smollm2-135m--lalte"))
HALF_LINEAR = Hybrid("hybrid, half linear", half_linear)


def random_teacher(name: str, *, tiny: bool) -> Any:
    """A model of that size, in bfloat16 on a GPU; on a CPU in float32, `tiny` at a few thousand parameters."""
    config = MODELS[name]
    on_gpu = torch.cuda.is_available()
    values = {**config.to_dict(), **(_TINY if tiny else {})}
    values.pop("layer_types", None)
    config = type(config)(**values)
    _, _, causal_lm = family(config.model_type).base_classes()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    try:
        with torch.device("cuda" if on_gpu else "cpu"):
            model: Any = causal_lm(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval()


def random_hybrid(name: str, hybrid: Hybrid, *, tiny: bool) -> Any:
    """The same with mixers as they are before training."""
    teacher = random_teacher(name, tiny=tiny)
    return swap(teacher, list(hybrid.layers(teacher.config.num_hidden_layers))).eval()
