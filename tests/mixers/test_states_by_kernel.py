"""The window's and the eviction's states, written and read by the Triton kernels in their interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hybridize.mixers import sliding_window, token_eviction
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.configs.sliding_window import SlidingWindowConfig
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize_kernels import use_implementation
from tests.mixers.one_layer import LAYER, OneLayer

CONFIGS: list[SlidingWindowConfig | TokenEvictionConfig] = [
    SlidingWindowConfig(window_tokens=9, sink_tokens=3),
    TokenEvictionConfig(window_tokens=8, budget_tokens=5, sink_tokens=2, scorer_dropout=0.0),
]
by_name = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)


def layer_of(config: MixerConfig) -> OneLayer:
    layer = OneLayer(config)
    layer.mixer.eval()
    if layer.mixer.new is not None:
        layer.disturb()
    return layer


@by_name
@torch.no_grad()
def test_pieces_by_the_kernels_equal_one_eager_call(config: MixerConfig) -> None:
    layer = layer_of(config)
    x, cache, lengths = layer.hidden_states(2, 31), DynamicCache(), [4, 1, 12, 1, 1, 9, 1, 1, 1]
    whole = layer(x)
    with use_implementation("triton"):
        torch.testing.assert_close(layer.pieces(x, cache, lengths), whole, atol=2e-5, rtol=0)
    other = DynamicCache()
    layer.pieces(x, other, lengths)
    expected = other.layers[LAYER].tensors
    for name, tensor in cache.layers[LAYER].tensors.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=0)


@by_name
@pytest.mark.parametrize("padding", [False, True])
@torch.no_grad()
def test_what_the_attention_is_told_of_the_order_is_so(
    config: SlidingWindowConfig | TokenEvictionConfig, padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int | None] = []

    def check(q: Tensor, k: Tensor, *args: Any, window: int, **options: Any) -> Tensor:
        queries, keys, first = options["query_positions"], options["key_positions"], options["ordered_from"]
        told.append(first)
        if first is not None:
            keys = keys if keys.ndim == 3 else keys[..., None]
            assert (keys.diff(dim=1)[keys[:, 1:] >= 0] > 0).all(), "in order, after what is empty"
            assert torch.equal(keys[:, -q.shape[1] :, 0], queries), "the queries are the last keys"
            shared = keys[:, first:]
            assert torch.equal(shared, shared[..., :1].expand_as(shared)), "the same for all heads"
            assert (shared.diff(dim=1)[shared[:, :-1] >= 0] == 1).all(), "consecutive after padding"
            prefix = keys[:, :first]
            assert ((prefix < 0) | (prefix <= queries[:, :1, None] - window)).all(), "outside every window"
        elif queries is None:
            assert q.shape[1] == k.shape[1]
        return attention(q, k, *args, window=window, **options)

    module = sliding_window if config.name == "sliding_window" else token_eviction
    attention = module.retained_attention  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "retained_attention", check)
    layer, lengths = layer_of(config), [3, 1, 12, 1, 10, 5]
    x, cache, start = layer.hidden_states(3, sum(lengths)), DynamicCache(), 0
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    if padding:
        real[0, :2] = real[1, 5:9] = False
    positions = torch.where(real, real.cumsum(1) - 1, -1)
    for length in lengths:
        layer(x[:, start : start + length], cache, positions[:, start : start + length])
        start += length
    retained = config.sink_tokens if isinstance(config, SlidingWindowConfig) else config.budget_tokens
    # Only a turn that is padded itself has to be looked at.
    assert told == [None, None if padding else retained, retained, retained]


@torch.no_grad()
def test_scratch_memory_is_kept_and_is_no_part_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDIZE_RETAINED_DECODE", "16,4,2,99")  # several tiles, and so several programs, a head
    layer, cache = layer_of(SlidingWindowConfig(window_tokens=20)), DynamicCache()
    x = layer.hidden_states(2, 5)
    with use_implementation("triton"):
        layer.pieces(x[:, :4], cache, [3, 1])
        state = cache.layers[LAYER]
        scratch = dict(state.workspace)
        assert scratch
        layer(x[:, 4:], cache)
    assert all(state.workspace[name] is tensor for name, tensor in scratch.items())
    assert state.bytes_per_sequence() == layer.mixer.config.state_bytes(layer.geometry, 5, 4)
