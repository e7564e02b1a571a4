"""Native sparse attention as a mixer: where it equals the teacher, and what its growing state holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hybridize.errors import RecipeError
from hybridize.mixers.configs.native_sparse_attention import NativeSparseAttentionConfig
from tests.mixers.one_layer import LAYER, OneLayer

SMALL = NativeSparseAttentionConfig(block_tokens=4, selected_blocks=3, window_tokens=6)
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def set_gates(layer: OneLayer, compressed: float, selected: float, window: float) -> None:
    """Opens or shuts the branches whatever the input: sigmoid(±100) is 1 or 0 in fp32, bit for bit."""
    with torch.no_grad():
        layer.mixer.new.branch_gates.weight.zero_()
        wanted = torch.tensor([compressed, selected, window]).repeat(layer.geometry.num_query_heads)
        layer.mixer.new.branch_gates.bias.copy_(torch.where(wanted > 0.5, 100.0, -200.0))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_all_blocks_selected_and_the_other_branches_shut_is_the_teacher(model_type: str) -> None:
    layer = OneLayer(dataclasses.replace(SMALL, selected_blocks=8), model_type)
    set_gates(layer, 0.0, 1.0, 0.0)
    x = layer.hidden_states(2, 30)
    torch.testing.assert_close(layer(x), layer.teacher(x), **TOLERANCE)


@torch.no_grad()
def test_an_open_window_as_long_as_the_text_is_the_teacher() -> None:
    layer = OneLayer(dataclasses.replace(SMALL, window_tokens=30))
    set_gates(layer, 0.0, 0.0, 1.0)
    x = layer.hidden_states(2, 30)
    torch.testing.assert_close(layer(x), layer.teacher(x), **TOLERANCE)


@torch.no_grad()
def test_positions_below_dense_below_are_the_teacher_and_those_above_are_not() -> None:
    layer = OneLayer(dataclasses.replace(SMALL, dense_below=24))
    layer.disturb()
    x = layer.hidden_states(2, 30)
    out, teacher = layer(x), layer.teacher(x)
    torch.testing.assert_close(out[:, :24], teacher[:, :24], **TOLERANCE)
    assert ((out - teacher)[:, 24:].abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_starts_at_the_teacher_while_nothing_is_out_of_sight() -> None:
    """Selected and window gates sum to 1; what is left is the 2 % of the compressed branch."""
    layer = OneLayer(NativeSparseAttentionConfig())
    x = layer.hidden_states(2, 200)
    out, teacher = layer(x), layer.teacher(x)
    torch.testing.assert_close(out[:, :63], teacher[:, :63], **TOLERANCE)
    assert (out - teacher).norm() / teacher.norm() < 0.02


@torch.no_grad()
def test_the_gates_are_set_from_whatever_was_in_memory() -> None:
    config = dataclasses.replace(SMALL, compressed_gate=0.05, selected_gate=0.7, window_gate=0.3)
    layer = OneLayer(config)
    gates = layer.mixer.new.branch_gates
    for parameter in gates.parameters():
        parameter.fill_(float("nan"))
    layer.mixer.initialise_new()
    values = torch.sigmoid(gates(layer.hidden_states(1, 3))).unflatten(-1, (-1, 3))
    assert torch.allclose(values, torch.tensor([0.05, 0.7, 0.3]).expand_as(values), atol=1e-6)


def test_the_gradient_reaches_every_parameter_from_the_start() -> None:
    layer = OneLayer(SMALL, "qwen3")
    layer(layer.hidden_states(2, 20)).square().mean().backward()
    silent = [name for name, p in layer.mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("lengths", [[1] * 30, [22, 1, 1, 6], [2, 1, 17, 10], [13, 17]])
@torch.no_grad()
def test_pieces_equal_one_shot(lengths: list[int]) -> None:
    layer = OneLayer(SMALL, "qwen3")
    layer.disturb()
    x = layer.hidden_states(2, 30)
    torch.testing.assert_close(layer.pieces(x, DynamicCache(), lengths), layer(x), **TOLERANCE)


def padded_turns() -> tuple[Tensor, Tensor]:
    """Positions of two turns: row 0 is padded before each of them, row 1 never."""
    first = torch.tensor([[-1] * 5 + list(range(9)), list(range(14))])
    second = torch.tensor([[-1] * 3 + list(range(9, 16)), list(range(14, 24))])
    return first, second


@torch.no_grad()
def test_padding_before_or_between_turns_changes_nothing() -> None:
    layer = OneLayer(SMALL)
    layer.disturb()
    x = layer.hidden_states(2, 24)
    first, second = padded_turns()
    cache = DynamicCache()
    padded = torch.cat((layer(x[:, :14], cache, first), layer(x[:, 14:], cache, second)), dim=1)
    at_once = layer(x, positions=torch.cat((first, second), dim=1))
    real = torch.cat((first, second), dim=1)[0] >= 0
    for out in (padded, at_once):
        torch.testing.assert_close(out[:1, real], layer(x[:1, real]), **TOLERANCE)
        torch.testing.assert_close(out[1:], layer(x[1:]), **TOLERANCE)


@torch.no_grad()
def test_running_sums_equal_the_pooled_blocks() -> None:
    layer = OneLayer(SMALL)
    x = layer.hidden_states(2, 24)
    first, second = padded_turns()
    cache = DynamicCache()
    layer(x[:, :14], cache, first)
    for column in range(second.shape[1]):
        layer(x[:, 14 + column : 15 + column], cache, second[:, column : column + 1])
    state = cache.layers[LAYER]
    for kept, sums in (("keys", "key_sums"), ("values", "value_sums")):
        for row in range(2):
            block_of = torch.where(state["positions"][row] >= 0, state["positions"][row] // SMALL.block_tokens, -1)
            for block in range(6):
                pooled = state[kept][row, block_of == block].sum(0)
                torch.testing.assert_close(state[sums][row, block], pooled, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_state_is_as_large_as_promised_at_every_length(dtype: torch.dtype) -> None:
    layer = OneLayer(SMALL, dtype=dtype)
    cache = DynamicCache()
    for tokens in (1, 2, 1, 5, 30):
        out = layer(layer.hidden_states(2, tokens), cache)
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
        state = cache.layers[LAYER]
        assert state.bytes_per_sequence() == SMALL.state_bytes(layer.geometry, state.seen_tokens, dtype.itemsize)


def test_the_plan_counts_the_new_parameters_rightly() -> None:
    layer = OneLayer(SMALL, "qwen3")
    assert sum(p.numel() for p in layer.mixer.new.parameters()) == SMALL.new_parameters(layer.geometry)


def test_warns_where_nothing_is_left_out() -> None:
    geometry = OneLayer(SMALL).geometry
    assert len(SMALL.warnings(geometry, 12)) == 1
    assert SMALL.warnings(geometry, 13) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_tokens", 0),
        ("selected_blocks", 2),
        ("window_tokens", 0),
        ("dense_below", -1),
        ("compressed_gate", 0.0),
        ("selected_gate", 1.0),
        ("window_gate", float("nan")),
    ],
)
def test_refuses_values_out_of_range(key: str, value: float) -> None:
    with pytest.raises(RecipeError, match=rf"native_sparse_attention\.{key}"):
        NativeSparseAttentionConfig(**{key: value})
