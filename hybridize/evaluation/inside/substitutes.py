"""A window in the place of a mixer: the same projections, norms and scale, and no older token but the sinks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from hybridize.evaluation.inside.layers import Layer, layers_of
from hybridize.families import family
from hybridize.mixers.configs.sliding_window import SlidingWindowConfig
from hybridize.mixers.sliding_window import SlidingWindow

SINK_TOKENS = 4
"""Of mixers that have no sinks of their own. A softmax that has learned to rest on the first tokens breaks without
them (arXiv 2309.17453), and that loss would drown the one that is asked about."""


def windows_instead(model: Any, window_tokens: int) -> dict[int, SlidingWindow]:
    """By layer, the window that stands in for what is there; layers that are a window already are left out.

    Args:
        window_tokens: of the windows for mixers that have none of their own.
    """
    substitutes = {}
    for layer in layers_of(model):
        config = _window_of(layer, window_tokens)
        if config is not None:
            substitutes[layer.index] = SlidingWindow.from_attention(layer.view, config).eval()
    return substitutes


@contextmanager
def replaced(model: Any, substitutes: Mapping[int, nn.Module]) -> Iterator[None]:
    """While it lasts, these modules are the attention of their layers; then the model is what it was, bit for bit."""
    adapter = family(model.config.model_type)
    layers = adapter.layers(model.model)
    originals = {index: adapter.attention(layers[index]) for index in substitutes}
    try:
        for index, module in substitutes.items():
            adapter.replace(layers[index], module)
        yield
    finally:
        for index, module in originals.items():
            adapter.replace(layers[index], module)


def _window_of(layer: Layer, window_tokens: int) -> SlidingWindowConfig | None:
    if layer.mixer == "sliding_window":
        return None
    if layer.mixer == "token_eviction":
        config = layer.attention.config
        return SlidingWindowConfig(window_tokens=config.window_tokens, sink_tokens=config.sink_tokens)
    if layer.mixer == "native_sparse_attention":
        return SlidingWindowConfig(window_tokens=layer.attention.config.window_tokens, sink_tokens=SINK_TOKENS)
    own = layer.view.geometry.windows[layer.index]
    if layer.mixer == "full_attention" and own is not None and own <= window_tokens:
        return None
    return SlidingWindowConfig(window_tokens=window_tokens, sink_tokens=SINK_TOKENS)
