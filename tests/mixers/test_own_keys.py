"""Keys and values of their own for every query head: the same start, apart from then on, counted and loaded rightly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hybridize.families import family
from hybridize.mixers.configs.full_attention import FullAttentionConfig
from hybridize.mixers.configs.gated_delta_net import GatedDeltaNetConfig
from hybridize.mixers.parts.own_keys import with_own_keys
from hybridize.model.convert import save_model
from hybridize.model.load import load_hybrid
from hybridize.model.swap import swap, undo
from tests.mixers.one_layer import LAYER, OneLayer
from tests.tiny import FAMILY_NAMES, tiny_teacher, tiny_tokens

SHARED = GatedDeltaNetConfig()
OWN = GatedDeltaNetConfig(own_keys=True)


def filled_biases(layer: OneLayer) -> None:
    """A tiny teacher may start with biases of zero, which any repetition would leave right."""
    for projection in (layer.view.k_proj, layer.view.v_proj):
        if projection.bias is not None:
            nn.init.normal_(projection.bias)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
@torch.no_grad()
def test_whole_heads_with_their_biases_are_repeated(model_type: str) -> None:
    layer = OneLayer(SHARED, model_type)
    filled_biases(layer)
    view, geometry = with_own_keys(layer.view), layer.geometry
    size = geometry.head_size
    assert geometry.group_size > 1
    for narrow, wide in ((layer.view.k_proj, view.k_proj), (layer.view.v_proj, view.v_proj)):
        assert wide.weight.shape == (geometry.num_query_heads * size, geometry.hidden_size)
        for head in range(geometry.num_query_heads):
            key_head = head // geometry.group_size
            rows, source = slice(head * size, (head + 1) * size), slice(key_head * size, (key_head + 1) * size)
            assert torch.equal(wide.weight[rows], narrow.weight[source])
            assert (wide.bias is None) == (narrow.bias is None)
            if narrow.bias is not None:
                assert torch.equal(wide.bias[rows], narrow.bias[source])
    assert view.k_norm is layer.view.k_norm
    assert view.q_proj is layer.view.q_proj


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
@pytest.mark.parametrize("options", [{}, {"rope": True, "output_norm": True}, {"short_convolution": 0}])
@torch.no_grad()
def test_starts_with_the_output_of_shared_keys(model_type: str, options: dict[str, bool]) -> None:
    shared = OneLayer(replace(SHARED, **options), model_type)
    own = OneLayer(replace(OWN, **options), model_type)
    for layer in (shared, own):
        torch.manual_seed(3)
        filled_biases(layer)
    own = remade(own)  # the biases were copied when it was made
    x = shared.hidden_states(2, 30)
    torch.testing.assert_close(own(x), shared(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(own.pieces(x, DynamicCache(), [1, 20, 9]), shared(x), atol=1e-5, rtol=1e-5)


def remade(layer: OneLayer) -> OneLayer:
    """The mixer made again from the present teacher."""
    layer.mixer = type(layer.mixer).from_attention(layer.view, layer.mixer.config)
    return layer


def test_heads_of_a_group_learn_apart_and_the_teacher_stays_as_it_is() -> None:
    layer = OneLayer(OWN)
    x = layer.hidden_states(2, 12)
    before = layer.view.k_proj.weight.clone()
    layer(x).square().mean().backward()
    gradient = layer.mixer.k_proj.weight.grad
    assert gradient is not None
    first, second = gradient.unflatten(0, (layer.geometry.num_query_heads, -1))[:2]
    assert not torch.allclose(first, second)
    with torch.no_grad():
        layer.mixer.k_proj.weight -= gradient
    assert torch.equal(layer.view.k_proj.weight, before)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
@pytest.mark.parametrize("taps", [0, 4])
def test_the_plan_counts_parameters_and_state(model_type: str, taps: int) -> None:
    config = replace(OWN, short_convolution=taps)
    layer = OneLayer(config, model_type)
    parts = [layer.view.q_proj, layer.view.k_proj, layer.view.v_proj, layer.view.o_proj]
    of_teacher = sum(p.numel() for part in parts for p in part.parameters())
    norms = sum(p.numel() for norm in (layer.view.q_norm, layer.view.k_norm) if norm for p in norm.parameters())
    of_mixer = sum(p.numel() for p in layer.mixer.parameters())
    assert of_mixer - norms == of_teacher + config.new_parameters(layer.geometry)
    cache = DynamicCache()
    with torch.no_grad():
        layer(layer.hidden_states(2, 7), cache)
    assert cache.layers[LAYER].bytes_per_sequence() == config.state_bytes(layer.geometry, 7, 4)


def test_without_shared_heads_nothing_is_copied() -> None:
    layer = OneLayer(OWN, num_key_value_heads=4)
    assert with_own_keys(layer.view) is layer.view
    assert layer.mixer.k_proj is layer.view.k_proj
    assert OWN.new_parameters(layer.geometry) == SHARED.new_parameters(layer.geometry)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
@torch.no_grad()
def test_written_read_and_undone(model_type: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(model_type).eval()
    tokens = tiny_tokens(2, 20)
    expected = teacher(tokens).logits
    layers = [FullAttentionConfig(), OWN, OWN, FullAttentionConfig()]
    hybrid = swap(teacher, layers)
    for mixer in hybrid.mixers.values():
        mixer.k_proj.weight += 0.1 * torch.randn_like(mixer.k_proj.weight)
    wanted = hybrid(tokens).logits
    save_model(hybrid, tmp_path)
    loaded = load_hybrid(tmp_path, dtype=torch.float32, complete=False).eval()
    assert torch.equal(loaded(tokens).logits, wanted)
    geometry = family(model_type).geometry(loaded.config.to_dict())
    wide = geometry.num_query_heads * geometry.head_size
    assert {tuple(mixer.v_proj.weight.shape) for mixer in loaded.mixers.values()} == {(wide, geometry.hidden_size)}
    assert torch.equal(undo(hybrid)(tokens).logits, expected)
