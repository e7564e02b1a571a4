"""Gated DeltaNet against its equation, its state against its promise, its start against the teacher's weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from hybridize.errors import RecipeError
from hybridize.mixers.configs.gated_delta_net import GatedDeltaNetConfig
from tests.mixers.one_layer import LAYER, OneLayer

EVERYTHING = GatedDeltaNetConfig(
    rope=True, short_convolution=4, output_gate=True, output_norm=True, negative_eigenvalues=True
)
PLAIN = GatedDeltaNetConfig(
    rope=False, short_convolution=0, output_gate=False, output_norm=False, negative_eigenvalues=False
)
CONFIGS = [pytest.param(PLAIN, id="plain"), pytest.param(EVERYTHING, id="everything")]
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def by_the_equation(layer: OneLayer, x: Tensor) -> Tensor:
    """The mixer written token by token and head by head, from the teacher's parts; x is [1, T, hidden_size]."""
    view, new, config, geometry = layer.view, layer.mixer.new, layer.mixer.config, layer.geometry
    tokens, size = x.shape[1], geometry.head_size
    q, k, v = (p(x)[0].view(tokens, -1, size) for p in (view.q_proj, view.k_proj, view.v_proj))
    if view.q_norm is not None and view.k_norm is not None:
        q, k = view.q_norm(q), view.k_norm(k)
    if config.short_convolution:
        q, k, v = (convolved(a, taps) for a, taps in ((q, new.q_taps), (k, new.k_taps), (v, new.v_taps)))
    if config.rope:
        cos, sin = (a[0].unsqueeze(1) for a in layer.rope(x, torch.arange(tokens)[None]))
        q, k = (a * cos + torch.cat((-a[..., size // 2 :], a[..., : size // 2]), -1) * sin for a in (q, k))
    out = torch.zeros(tokens, geometry.num_query_heads, size)
    ceiling = 2.0 if config.negative_eigenvalues else 1.0
    for head in range(geometry.num_query_heads):
        key_head = head // geometry.group_size
        state = torch.zeros(size, size)
        for t in range(tokens):
            step = F.softplus(new.decay.weight[head] @ x[0, t] + new.decay_bias[head])
            decay = torch.exp(-torch.exp(new.decay_rate[head]) * step)
            beta = ceiling * torch.sigmoid(new.beta.weight[head] @ x[0, t] + new.beta.bias[head])
            key, query = F.normalize(k[t, key_head], dim=0), F.normalize(q[t, head], dim=0)
            erase = torch.eye(size) - beta * torch.outer(key, key)
            state = decay * erase @ state + beta * torch.outer(key, v[t, key_head])
            out[t, head] = state.T @ query
    if config.output_norm:
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-6)
    out = out * new.output_scale
    if config.output_gate:
        out = out * 2.0 * torch.sigmoid(new.output_gate(x[0])).view_as(out)
    return view.o_proj(out.flatten(1))[None]


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """Causal convolution of x [T, heads, D] with taps [heads·D, n], the newest token last."""
    flat, width = x.flatten(1), taps.shape[1]
    out = torch.zeros_like(flat)
    for t in range(flat.shape[0]):
        for back in range(min(width, t + 1)):
            out[t] += flat[t - back] * taps[:, width - 1 - back]
    return out.view_as(x)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_equals_its_equation_with_the_teachers_biases_norms_and_heads(
    model_type: str, config: GatedDeltaNetConfig
) -> None:
    layer = OneLayer(config, model_type)
    layer.disturb()
    x = layer.hidden_states(1, 11)
    torch.testing.assert_close(layer(x), by_the_equation(layer, x), **TOLERANCE)


@torch.no_grad()
def test_keys_are_shared_by_whole_heads_and_a_row_wise_repeat_is_something_else() -> None:
    """One key head a query head, made by repeating heads, is the same mixer; made by repeating rows, it is not."""
    grouped = OneLayer(PLAIN)
    x = grouped.hidden_states(1, 9)
    group, size = grouped.geometry.group_size, grouped.geometry.head_size
    assert group > 1
    wide = OneLayer(PLAIN, num_key_value_heads=grouped.geometry.num_query_heads)
    wide.mixer.q_proj, wide.mixer.o_proj = grouped.mixer.q_proj, grouped.mixer.o_proj
    for name in ("k_proj", "v_proj"):
        weight = getattr(grouped.mixer, name).weight
        by_heads = weight.view(-1, size, weight.shape[1]).repeat_interleave(group, dim=0).flatten(0, 1)
        getattr(wide.mixer, name).weight.copy_(by_heads)
    expected = grouped(x)
    torch.testing.assert_close(wide(x), expected, **TOLERANCE)
    for name in ("k_proj", "v_proj"):
        weight = getattr(grouped.mixer, name).weight
        getattr(wide.mixer, name).weight.copy_(weight.repeat_interleave(group, dim=0))
    assert (wide(x) - expected).abs().max() > 0.01


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("lengths", [[1] * 23, [20, 1, 1, 1], [2, 1, 17, 3], [9, 14]])
@torch.no_grad()
def test_pieces_equal_one_shot(config: GatedDeltaNetConfig, lengths: list[int]) -> None:
    layer = OneLayer(config, "qwen3")
    layer.disturb()
    x = layer.hidden_states(2, 23)
    torch.testing.assert_close(layer.pieces(x, DynamicCache(), lengths), layer(x), **TOLERANCE)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_padding_before_or_between_turns_changes_nothing(config: GatedDeltaNetConfig) -> None:
    layer = OneLayer(config)
    layer.disturb()
    x = layer.hidden_states(2, 12)
    # Row 0 has three columns of padding before its text and two more before its second turn; row 1 has none.
    first = torch.tensor([[-1, -1, -1, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    second = torch.tensor([[-1, -1, 3, 4, 5, 6], [6, 7, 8, 9, 10, 11]])
    cache = DynamicCache()
    padded = torch.cat((layer(x[:, :6], cache, first), layer(x[:, 6:], cache, second)), dim=1)
    real = torch.cat((first, second), dim=1)[0] >= 0
    torch.testing.assert_close(padded[:1, real], layer(x[:1, real]), **TOLERANCE)
    torch.testing.assert_close(padded[1:], layer(x[1:]), **TOLERANCE)
    alone = DynamicCache()
    layer(x[:1, real], alone)
    for name, tensor in cache.layers[LAYER].tensors.items():
        torch.testing.assert_close(tensor[:1], alone.layers[LAYER][name], **TOLERANCE)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tokens", [12, 22])
@torch.no_grad()
def test_padding_may_hold_anything(config: GatedDeltaNetConfig, tokens: int) -> None:
    """A step for few tokens, chunks for more: neither lets what is not finite there reach the state."""
    layer = OneLayer(config)
    layer.disturb()
    x = layer.hidden_states(1, tokens)
    positions = torch.tensor([[-1, -1, *range(tokens - 2)]])
    expected = layer(x[:, 2:], DynamicCache())
    x[:, :2] = float("nan")
    cache = DynamicCache()
    torch.testing.assert_close(layer(x, cache, positions)[:, 2:], expected, **TOLERANCE)
    assert all(tensor.isfinite().all() for tensor in cache.layers[LAYER].tensors.values())


@torch.no_grad()
def test_every_new_parameter_is_set_from_whatever_was_in_memory() -> None:
    layer = OneLayer(EVERYTHING, num_attention_heads=6)
    new = layer.mixer.new
    for parameter in new.parameters():
        parameter.fill_(float("nan"))
    layer.mixer.initialise_new()
    x = layer.hidden_states(1, 5)
    log_decay, beta = new.gates(x, torch.ones(1, 5, dtype=torch.bool))
    assert torch.allclose(beta, torch.tensor(0.5))
    half_lives = -math.log(2.0) / log_decay[0, 0]
    assert torch.allclose(half_lives, torch.tensor([256.0 ** (i / 5) for i in range(6)]), rtol=1e-4)
    out = torch.randn(1, 5, 6, layer.geometry.head_size)
    norm = out.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(new.finish(out, x), out / norm * new.output_scale, atol=1e-4)  # the gate lets all through
    assert all(torch.isfinite(parameter).all() for parameter in new.parameters())


@torch.no_grad()
def test_a_convolution_starts_as_the_identity() -> None:
    with_taps = OneLayer(GatedDeltaNetConfig(short_convolution=4))
    without = OneLayer(GatedDeltaNetConfig(short_convolution=0))
    x = with_taps.hidden_states(2, 10)
    torch.testing.assert_close(with_taps(x), without(x), **TOLERANCE)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_gradient_reaches_every_parameter_from_the_start(config: GatedDeltaNetConfig) -> None:
    layer = OneLayer(config, "qwen3")
    layer(layer.hidden_states(2, 9)).square().mean().backward()
    silent = [name for name, p in layer.mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_the_state_is_as_large_as_promised_at_every_length(config: GatedDeltaNetConfig, dtype: torch.dtype) -> None:
    layer = OneLayer(config, dtype=dtype)
    cache = DynamicCache()
    for tokens in (1, 7, 30):
        out = layer(layer.hidden_states(2, tokens), cache)
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
        state = cache.layers[LAYER]
        promised = config.state_bytes(layer.geometry, state.seen_tokens, dtype.itemsize)
        assert state.bytes_per_sequence() == promised
        assert state["recurrent"].dtype == torch.float32


@pytest.mark.parametrize("config", CONFIGS)
def test_trains_with_wide_new_parameters_in_a_bf16_model(config: GatedDeltaNetConfig) -> None:
    layer = OneLayer(config, dtype=torch.bfloat16)
    layer.mixer.new.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(layer.hidden_states(2, 9))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in layer.mixer.new.parameters())


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_plan_counts_the_new_parameters_rightly(config: GatedDeltaNetConfig, model_type: str) -> None:
    layer = OneLayer(config, model_type)
    assert sum(p.numel() for p in layer.mixer.new.parameters()) == config.new_parameters(layer.geometry)


@pytest.mark.parametrize("taps", [-1, 1, 17])
def test_refuses_a_convolution_of_no_use(taps: int) -> None:
    with pytest.raises(RecipeError, match=r"gated_delta_net\.short_convolution"):
        GatedDeltaNetConfig(short_convolution=taps)


def test_a_step_writes_the_tail_in_place_even_after_a_prompt_in_inference_mode() -> None:
    layer = OneLayer(EVERYTHING)
    layer.disturb()
    x = layer.hidden_states(2, 12)
    cache = DynamicCache()
    with torch.inference_mode():
        outputs = [layer(x[:, :8], cache)]
    with torch.no_grad():
        outputs.append(layer(x[:, 8:9], cache))
        address = cache.layers[LAYER]["tail"].data_ptr()
        outputs += [layer(x[:, t : t + 1], cache) for t in range(9, 12)]
        torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x), **TOLERANCE)
    assert cache.layers[LAYER]["tail"].data_ptr() == address
