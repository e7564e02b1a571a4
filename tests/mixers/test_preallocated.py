"""The cache layer that keeps its room, beside transformers' own, which makes keys and values anew."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hybridize.errors import UsageError
from hybridize.mixers.parts.preallocated import SPARE_FRACTION, SPARE_TOKENS, PreallocatedLayer, preallocate
from tests.tiny import tiny_config, tiny_teacher, tiny_tokens

HEADS, KEY_SIZE, VALUE_SIZE = 2, 4, 6


def new_tokens(rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(rows, HEADS, tokens, size).to(dtype) for size in (KEY_SIZE, VALUE_SIZE))  # type: ignore[return-value]


def addresses(layer: PreallocatedLayer) -> tuple[int, int]:
    return layer.keys.data_ptr(), layer.values.data_ptr()


def assert_same(layer: Any, other: Any) -> None:
    assert layer.get_seq_length() == other.get_seq_length()
    assert layer.get_mask_sizes(3) == other.get_mask_sizes(3)
    if other.get_seq_length():
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
        assert layer.keys.dtype == other.keys.dtype


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_any_sequence_of_operations_leaves_what_the_base_holds(seed: int) -> None:
    draw = random.Random(seed)
    layer, other, rows = PreallocatedLayer(), DynamicLayer(), 2
    for _ in range(60):
        match draw.choice(("token", "token", "token", "tokens", "crop", "reorder", "select", "repeat", "move", "room")):
            case "token" | "tokens" as how:
                new = new_tokens(rows, 1 if how == "token" else draw.randrange(2, 90))
                for found, expected in zip(layer.update(*new), other.update(*new), strict=True):
                    assert torch.equal(found, expected)
            case "crop" if layer.get_seq_length() > 1:
                removed = draw.randrange(layer.get_seq_length())
                layer.crop(-removed)
                other.crop(-removed)
            case "reorder" if layer.get_seq_length():
                order = torch.tensor([draw.randrange(rows) for _ in range(rows)])
                layer.reorder_cache(order)
                other.reorder_cache(order)
            case "select" if rows > 3:
                chosen = torch.tensor(draw.sample(range(rows), 2))
                layer.batch_select_indices(chosen)
                other.batch_select_indices(chosen)
                rows = 2
            case "repeat" if rows <= 3:
                layer.batch_repeat_interleave(2)
                other.batch_repeat_interleave(2)
                rows *= 2
            case "move":
                layer.offload()
                layer.prefetch()
            case "room":
                layer.reserve(draw.randrange(400))
        assert_same(layer, other)


@torch.no_grad()
def test_tokens_move_a_few_times_however_long_the_text() -> None:
    layer, moves, copied, held = PreallocatedLayer(), 0, 0, None
    for tokens in (1000, *(1,) * 7000):
        layer.update(*new_tokens(1, tokens))
        if addresses(layer) != held:
            moves, copied = moves + 1, copied + layer.get_seq_length()
        held = addresses(layer)
        assert layer.capacity - layer.get_seq_length() <= max(SPARE_TOKENS, layer.get_seq_length() // SPARE_FRACTION)
    assert moves < 20
    assert copied < (SPARE_FRACTION + 1) * 8000


@pytest.mark.parametrize("early", [False, True])
@torch.no_grad()
def test_reserved_room_is_made_once_and_outlives_a_reset(early: bool) -> None:
    layer = PreallocatedLayer()
    if early:
        layer.reserve(500)
    layer.update(*new_tokens(2, 30))
    layer.reserve(500)
    held = addresses(layer)
    for tokens in (1, 400, 1, 68):
        layer.update(*new_tokens(2, tokens))
    layer.crop(-100)
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.update(*new_tokens(2, 100))
    assert (layer.get_seq_length(), layer.capacity, addresses(layer)) == (500, 500, held)
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(*new_tokens(2, 7))
    assert addresses(layer) == held
    layer.reset()
    layer.update(*new_tokens(3, 7))  # another batch
    assert layer.keys.shape == (3, HEADS, 7, KEY_SIZE)
    assert layer.capacity == 500


@torch.no_grad()
def test_a_snapshot_is_put_back_where_it_was() -> None:
    layer = PreallocatedLayer()
    empty = layer.snapshot()
    layer.update(*new_tokens(2, 30))
    saved, keys, held = layer.snapshot(), layer.keys.clone(), addresses(layer)
    layer.crop(-20)
    layer.update(*new_tokens(2, 40))
    layer.restore(saved)
    assert torch.equal(layer.keys, keys)
    assert addresses(layer) == held
    layer.restore(empty)
    assert layer.get_seq_length() == 0
    fresh = PreallocatedLayer()
    fresh.restore(saved)
    assert torch.equal(fresh.keys, keys)
    fresh.update(*new_tokens(2, 1))
    assert torch.equal(saved.tensors["keys"], keys)


def test_gradients_flow_through_what_is_held() -> None:
    layer, other = PreallocatedLayer(), DynamicLayer()
    with torch.no_grad():
        before = new_tokens(2, 5)
        layer.update(*before)
        other.update(*before)
    found = []
    pieces = [tuple(x.requires_grad_() for x in new_tokens(2, tokens)) for tokens in (3, 1, 2)]
    for cache in (layer, other):
        loss = torch.zeros(())
        for piece in pieces:
            keys, values = cache.update(*piece)
            loss = loss + keys.square().sum() * values.square().sum()
        found.append(torch.autograd.grad(loss, [x for piece in pieces for x in piece]))
    for gradient, expected in zip(*found, strict=True):
        assert torch.equal(gradient, expected)
    with torch.no_grad():
        new = new_tokens(2, 1)
        layer.update(*new)
        other.update(*new)
    assert_same(layer, other)
    assert not layer.keys.requires_grad


@torch.no_grad()
def test_what_others_put_into_the_layer_is_kept() -> None:
    layer, new = PreallocatedLayer(), new_tokens(2, 3)
    layer.update(*new_tokens(2, 9))
    layer.keys, layer.values = (x[:, :, 2:6] for x in (layer.keys, layer.values))
    held = layer.keys.clone()
    keys, _ = layer.update(*new)
    assert torch.equal(keys, torch.cat((held, new[0]), dim=2))


@torch.no_grad()
def test_a_wider_type_widens_what_is_held() -> None:
    layer, other = PreallocatedLayer(), DynamicLayer()
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        new = new_tokens(2, 3, dtype)
        layer.update(*new)
        other.update(*new)
        assert_same(layer, other)


@torch.no_grad()
def test_rows_are_not_spread_silently() -> None:
    layer = PreallocatedLayer()
    layer.update(*new_tokens(2, 3))
    with pytest.raises(UsageError, match="holds 2 rows, and tokens of 1"):
        layer.update(*new_tokens(1, 1))


@torch.no_grad()
def test_a_copied_layer_has_room_of_its_own() -> None:
    layer = PreallocatedLayer()
    layer.update(*new_tokens(2, 3))
    twin, held = copy.deepcopy(layer), layer.keys.clone()
    address = addresses(twin)
    twin.update(*new_tokens(2, 3))
    assert addresses(twin) == address
    assert addresses(twin) != addresses(layer)
    twin.crop(-6)
    twin.update(*new_tokens(2, 3))
    assert torch.equal(layer.keys, held)


def test_only_empty_ordinary_layers_are_taken() -> None:
    cache = DynamicCache(config=tiny_config("mistral", sliding_window=6))
    preallocate(cache, range(4))
    assert all(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers)

    static = StaticCache(config=tiny_config(), max_cache_len=8)
    kinds = [type(layer) for layer in static.layers]
    preallocate(static, range(4))
    assert [type(layer) for layer in static.layers] == kinds

    model, cache = tiny_teacher(), DynamicCache()
    with torch.no_grad():
        model(tiny_tokens(1, 5), past_key_values=cache, use_cache=True)
    preallocate(cache, range(5))
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 4 + [PreallocatedLayer]


def test_a_cache_without_layers_gets_them() -> None:
    cache = DynamicCache()
    preallocate(cache, [0, 3])
    assert [type(layer) for layer in cache.layers] == [PreallocatedLayer, DynamicLayer, DynamicLayer, PreallocatedLayer]
