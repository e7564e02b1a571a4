"""Sliding window with sinks: what a query sees, and a state that shows it the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from hybridize.errors import RecipeError
from hybridize.mixers.base import Rope
from hybridize.mixers.configs.sliding_window import SlidingWindowConfig
from tests.mixers.one_layer import LAYER, OneLayer

WINDOW, SINKS = 5, 2
CONFIG = SlidingWindowConfig(window_tokens=WINDOW, sink_tokens=SINKS)
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@pytest.fixture
def layer() -> OneLayer:
    return OneLayer(CONFIG)


def by_hand(layer: OneLayer, x: Tensor, window: int, sinks: int) -> Tensor:
    """The teacher's projections under a mask written out pair by pair."""
    mixer, size = layer.mixer, layer.geometry.head_size
    tokens = x.shape[1]
    rope = Rope(*layer.rope(x, torch.arange(tokens)[None]))
    q, k, v = (p(x).unflatten(-1, (-1, size)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    group = layer.geometry.group_size
    q, k = rope(q, k)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    seen = torch.tensor([[j <= i and (i - j < window or j < sinks) for j in range(tokens)] for i in range(tokens)])
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * mixer.scale
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return mixer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 3), (5, 2), (7, 0), (40, 4)])
def test_mask_is_the_formula(window: int, sinks: int) -> None:
    layer = OneLayer(SlidingWindowConfig(window_tokens=window, sink_tokens=sinks))
    x = layer.hidden_states(2, 19)
    torch.testing.assert_close(layer(x), by_hand(layer, x, window, sinks), atol=1e-5, rtol=0)


def test_window_as_long_as_the_text_is_the_teacher(layer: OneLayer) -> None:
    x = layer.hidden_states(2, WINDOW)
    torch.testing.assert_close(layer(x), layer.teacher(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", CLOSE)
@torch.no_grad()
def test_decoding_equals_one_call_at_every_length(dtype: torch.dtype) -> None:
    layer = OneLayer(CONFIG, dtype=dtype)
    x = layer.hidden_states(2, 2 * WINDOW + 8)
    whole = layer(x)
    assert whole.dtype == dtype
    for prompt in range(1, 2 * WINDOW + 3):
        rest = [1] * (x.shape[1] - prompt)
        torch.testing.assert_close(layer.pieces(x, DynamicCache(), [prompt, *rest]), whole, atol=CLOSE[dtype], rtol=0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans())
def test_any_pieces_equal_one_call(lengths: list[int], with_gradient: bool) -> None:
    layer = OneLayer(CONFIG)
    x = layer.hidden_states(1, sum(lengths))
    with torch.set_grad_enabled(with_gradient):
        torch.testing.assert_close(layer.pieces(x, DynamicCache(), lengths), layer(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_different_lengths_are_independent(layer: OneLayer) -> None:
    lengths, tokens = [1, 4, 13, 20], 20
    x = layer.hidden_states(len(lengths), tokens + 6)
    # -1 for padding on the left, then each row's own count.
    positions = torch.stack([torch.arange(tokens + 6) - (tokens - n) for n in lengths]).clamp(min=-1)
    cache = DynamicCache()
    parts = [layer(x[:, a:b], cache, positions[:, a:b]) for a, b in [(0, 9), (9, 20), (20, 21), (21, 26)]]
    batched = torch.cat(parts, dim=1)
    for row, length in enumerate(lengths):
        start = tokens - length
        alone = layer(x[row : row + 1, start:])
        torch.testing.assert_close(batched[row : row + 1, start:], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_state_is_as_large_as_promised_at_every_length(layer: OneLayer) -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        layer = OneLayer(CONFIG, dtype=dtype)
        for tokens in (1, WINDOW, 50):
            cache = DynamicCache()
            layer(layer.hidden_states(3, tokens), cache)
            state = cache.layers[LAYER]
            assert state.bytes_per_sequence() == CONFIG.state_bytes(layer.geometry, tokens, size)


@torch.no_grad()
def test_state_made_in_inference_mode_can_be_continued_outside(layer: OneLayer) -> None:
    x, cache = layer.hidden_states(1, 9), DynamicCache()
    with torch.inference_mode():
        layer(x[:, :8], cache)
    torch.testing.assert_close(layer(x[:, 8:], cache), layer(x)[:, 8:], atol=1e-5, rtol=0)


def test_ranges_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"sliding_window\.window_tokens"):
        SlidingWindowConfig(window_tokens=0)
    with pytest.raises(RecipeError, match=r"sliding_window\.sink_tokens"):
        SlidingWindowConfig(sink_tokens=-1)


def test_warns_when_the_window_covers_the_context(layer: OneLayer) -> None:
    assert CONFIG.warnings(layer.geometry, WINDOW)
    assert not CONFIG.warnings(layer.geometry, WINDOW + 1)
