"""Native sparse attention as a mixer: where it equals the teacher, and what its growing state holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hybridize.errors import RecipeError
from hybridize.mixers.configs.native_sparse_attention import NativeSparseAttentionConfig
from hybridize_kernels import use_implementation
from tests.mixers.one_layer import LAYER, OneLayer

SMALL = NativeSparseAttentionConfig(block_tokens=4, selected_blocks=3, window_tokens=6)
LEARNED = dataclasses.replace(SMALL, compression="learned")
with_compression = pytest.mark.parametrize("config", [SMALL, LEARNED], ids=lambda config: config.compression)
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
def test_the_new_parameters_are_set_from_whatever_was_in_memory() -> None:
    config = dataclasses.replace(LEARNED, compressed_gate=0.05, selected_gate=0.7, window_gate=0.3)
    layer = OneLayer(config)
    gates = layer.mixer.new.branch_gates
    for parameter in layer.mixer.new.parameters():
        parameter.fill_(float("nan"))
    layer.mixer.initialise_new()
    values = torch.sigmoid(gates(layer.hidden_states(1, 3))).unflatten(-1, (-1, 3))
    assert torch.allclose(values, torch.tensor([0.05, 0.7, 0.3]).expand_as(values), atol=1e-6)
    assert all((weights == 1 / config.block_tokens).all() for weights in layer.mixer.new.pooling.values())


@torch.no_grad()
def test_a_learned_compression_starts_as_the_mean() -> None:
    mean, learned = OneLayer(SMALL), OneLayer(LEARNED)
    for layer in (mean, learned):
        set_gates(layer, 1.0, 0.0, 0.0)
    x = mean.hidden_states(2, 30)
    torch.testing.assert_close(learned(x), mean(x), **TOLERANCE)


@with_compression
def test_the_gradient_reaches_every_parameter_from_the_start(config: NativeSparseAttentionConfig) -> None:
    layer = OneLayer(config, "qwen3")
    layer(layer.hidden_states(2, 20)).square().mean().backward()
    silent = [name for name, p in layer.mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@with_compression
@pytest.mark.parametrize("lengths", [[1] * 30, [22, 1, 1, 6], [2, 1, 17, 10], [13, 17]])
@torch.no_grad()
def test_pieces_equal_one_shot(config: NativeSparseAttentionConfig, lengths: list[int]) -> None:
    layer = OneLayer(config, "qwen3")
    layer.disturb()
    x = layer.hidden_states(2, 30)
    torch.testing.assert_close(layer.pieces(x, DynamicCache(), lengths), layer(x), **TOLERANCE)


def padded_turns() -> tuple[Tensor, Tensor]:
    """Positions of two turns: row 0 is padded before each of them, row 1 never."""
    first = torch.tensor([[-1] * 5 + list(range(9)), list(range(14))])
    second = torch.tensor([[-1] * 3 + list(range(9, 16)), list(range(14, 24))])
    return first, second


@with_compression
@torch.no_grad()
def test_padding_before_or_between_turns_changes_nothing(config: NativeSparseAttentionConfig) -> None:
    layer = OneLayer(config)
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


@with_compression
@torch.no_grad()
def test_each_complete_block_is_pooled_once(config: NativeSparseAttentionConfig) -> None:
    layer = OneLayer(config)
    layer.disturb()
    x = layer.hidden_states(2, 24)
    first, second = padded_turns()
    cache = DynamicCache()
    layer(x[:, :14], cache, first)
    early = cache.layers[LAYER]["compressed_keys"].clone()
    for column in range(second.shape[1]):
        layer(x[:, 14 + column : 15 + column], cache, second[:, column : column + 1])
    state = cache.layers[LAYER]
    assert state["lengths"].tolist() == [16, 24]
    for name in ("keys", "values"):
        blocks = state[name].unflatten(1, (-1, SMALL.block_tokens))  # [B, blocks, block, H, D]
        weights = layer.mixer.new.pooling.get(f"{name[:-1]}_pooling")
        pooled = blocks.mean(2) if weights is None else (weights * blocks).sum(2)
        for row, length in enumerate(state["lengths"].tolist()):
            complete = length // SMALL.block_tokens
            torch.testing.assert_close(state[f"compressed_{name}"][row, :complete], pooled[row, :complete])
            assert (state[f"compressed_{name}"][row, complete:] == 0).all()
    for row, length in enumerate((9, 14)):
        complete = length // SMALL.block_tokens
        assert torch.equal(state["compressed_keys"][row, :complete], early[row, :complete])


@torch.no_grad()
def test_a_reserved_state_stays_where_it_is() -> None:
    layer, cache = OneLayer(SMALL), DynamicCache()
    layer.disturb()
    x = layer.hidden_states(2, 30)
    state = layer.mixer.claim_state(cache, 2, x)
    state.reserve(29)
    assert state["keys"].shape[1] == 32
    assert state["compressed_keys"].shape[1] == 8
    held = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    for _ in range(2):
        torch.testing.assert_close(layer.pieces(x, cache, [3, 1, 20, *[1] * 6]), layer(x), **TOLERANCE)
        assert {name: tensor.data_ptr() for name, tensor in state.tensors.items()} == held
        state.reset()
        assert all((tensor == 0).all() for tensor in state.tensors.values())


@torch.no_grad()
def test_slots_reserved_since_outlive_the_return_to_a_saved_state() -> None:
    layer, cache = OneLayer(SMALL), DynamicCache()
    layer.disturb()
    x = layer.hidden_states(2, 30)
    layer.pieces(x[:, :9], cache, [8, 1])
    state = cache.layers[LAYER]
    saved = state.snapshot()
    state.reserve(32)
    held = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    layer.pieces(layer.hidden_states(2, 12), cache, [1, 11])
    state.restore(saved)
    assert (state["keys"][:, 9:] == 0).all()
    torch.testing.assert_close(layer.pieces(x[:, 9:], cache, [1, 20]), layer(x)[:, 9:], **TOLERANCE)
    assert {name: tensor.data_ptr() for name, tensor in state.tensors.items()} == held


@with_compression
def test_a_gradient_flows_through_tokens_that_are_appended(config: NativeSparseAttentionConfig) -> None:
    layer = OneLayer(config)
    layer.disturb()
    x = layer.hidden_states(2, 22)
    parameters = dict(layer.mixer.named_parameters())
    direction = torch.randn(2, 10, layer.geometry.hidden_size)
    found = []
    for cache in (DynamicCache(), None):
        tail = x[:, 12:].clone().requires_grad_()
        if cache is None:
            with torch.no_grad():
                head = x[:, :12].clone()
            out = layer(torch.cat((head, tail), dim=1))[:, 12:]
        else:
            with torch.no_grad():
                layer(x[:, :12], cache)
            out = layer(tail, cache)
        found.append(torch.autograd.grad((out * direction).sum(), tail))
    torch.testing.assert_close(*found, **TOLERANCE)
    assert parameters.keys() >= {"hz_new.branch_gates.weight"}


@torch.no_grad()
def test_a_state_made_for_inference_may_be_written_outside_of_it() -> None:
    layer, cache = OneLayer(SMALL), DynamicCache()
    layer.disturb()
    x = layer.hidden_states(2, 24)
    with torch.inference_mode():
        layer(x[:, :10], cache)
    torch.testing.assert_close(layer.pieces(x[:, 10:], cache, [1, 3, 1, 9]), layer(x)[:, 10:], **TOLERANCE)


@with_compression
@torch.no_grad()
def test_steps_by_the_kernel_equal_one_eager_call(config: NativeSparseAttentionConfig) -> None:
    layer, cache = OneLayer(config), DynamicCache()
    layer.disturb()
    x = layer.hidden_states(2, 16)
    layer(x[:, :11], cache)
    with use_implementation("triton"):
        steps = layer.pieces(x[:, 11:], cache, [1] * 5)
    torch.testing.assert_close(steps, layer(x)[:, 11:], **TOLERANCE)
    assert list(cache.layers[LAYER].workspace)


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


def test_the_state_grows_in_steps() -> None:
    capacities = [SMALL.capacity(tokens) for tokens in range(4000)]
    assert capacities == sorted(capacities)
    assert all(slots % SMALL.block_tokens == 0 for slots in capacities)
    assert all(tokens <= slots <= 9 / 8 * tokens + SMALL.block_tokens for tokens, slots in enumerate(capacities))
    assert len(set(capacities[2000:])) <= 10


@with_compression
def test_the_plan_counts_the_new_parameters_rightly(config: NativeSparseAttentionConfig) -> None:
    layer = OneLayer(config, "qwen3")
    assert sum(p.numel() for p in layer.mixer.new.parameters()) == config.new_parameters(layer.geometry)


def test_warns_where_nothing_is_left_out() -> None:
    geometry = OneLayer(SMALL).geometry
    config = dataclasses.replace(SMALL, block_tokens=16)
    assert len(config.warnings(geometry, 48)) == 1
    assert config.warnings(geometry, 49) == []


@pytest.mark.parametrize(("block_tokens", "head_size"), [(48, 64), (4, 64), (256, 64), (128, 256)])
def test_warns_of_blocks_that_no_kernel_takes(block_tokens: int, head_size: int) -> None:
    geometry = dataclasses.replace(OneLayer(SMALL).geometry, head_size=head_size)
    (warning,) = dataclasses.replace(SMALL, block_tokens=block_tokens).warnings(geometry, 10**6)
    assert f"with {block_tokens}, training and prefill cost as much as full attention" in warning


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
        ("compression", "mlp"),
    ],
)
def test_refuses_values_out_of_range(key: str, value: float | str) -> None:
    with pytest.raises(RecipeError, match=rf"native_sparse_attention\.{key}"):
        NativeSparseAttentionConfig(**{key: value})  # type: ignore[arg-type]
