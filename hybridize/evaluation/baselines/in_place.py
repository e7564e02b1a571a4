"""A policy in the place of a model's attention, and another budget for a student's own eviction, for a while."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hybridize.evaluation.baselines.attention import PolicyAttention
from hybridize.evaluation.baselines.config import PolicyConfig
from hybridize.evaluation.inside.layers import layers_of, layers_with
from hybridize.evaluation.inside.substitutes import replaced
from hybridize.families import family
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.model.modeling import HybridModelMixin, hybrid_classes


@contextmanager
def policy_in_place(model: Any, configs: Mapping[int, PolicyConfig]) -> Iterator[None]:
    """While it lasts, the attention of these layers is a policy's; then it is what it was, bit for bit."""
    layers = {layer.index: layer for layer in layers_of(model)}
    substitutes = {
        index: PolicyAttention.from_attention(layers[index].view, config).eval() for index, config in configs.items()
    }
    inner = model.model
    original = type(inner)
    # A hybrid's inner model tells its mixers what is padding, whatever mask the attention of other layers gets.
    if not issubclass(original, HybridModelMixin):
        inner.__class__ = hybrid_classes(family(model.config.model_type)).model
    try:
        with replaced(model, substitutes):
            yield
    finally:
        inner.__class__ = original


@contextmanager
def budget_in_place(student: Any, budget_tokens: int | None, window_tokens: int | None = None) -> Iterator[None]:
    """While it lasts, the student's token-eviction layers have this budget and this window; None: their own.

    Raises:
        RecipeError: a layer cannot have them.
    """
    mixers = [layer.attention for layer in layers_with(student, "token_eviction")]
    configs = [mixer.config for mixer in mixers]
    changed = [with_budget(config, budget_tokens, window_tokens) for config in configs]
    try:
        for mixer, config in zip(mixers, changed, strict=True):
            mixer.config = config
        yield
    finally:
        for mixer, config in zip(mixers, configs, strict=True):
            mixer.config = config


def with_budget(
    config: TokenEvictionConfig, budget_tokens: int | None, window_tokens: int | None
) -> TokenEvictionConfig:
    """The same with another budget and window; None: its own."""
    return dataclasses.replace(
        config,
        budget_tokens=config.budget_tokens if budget_tokens is None else budget_tokens,
        window_tokens=config.window_tokens if window_tokens is None else window_tokens,
    )
