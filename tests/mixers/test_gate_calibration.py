"""The start that a gated delta net takes from text: its parts against loops, the whole against the start without it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.mixers.configs.gated_delta_net import GatedDeltaNetConfig
from hybridize.mixers.parts import gate_calibration
from hybridize.mixers.parts.gate_calibration import CANDIDATES, ChannelFit, GateFit, softmax_heads
from tests.mixers.one_layer import OneLayer

PLAIN = GatedDeltaNetConfig(short_convolution=0, output_gate=False, negative_eigenvalues=False)
CONFIGS = [
    pytest.param(PLAIN, id="plain"),
    pytest.param(GatedDeltaNetConfig(), id="default"),
    pytest.param(GatedDeltaNetConfig(rope=True, output_norm=True), id="everything"),
]


def heads_by_loops(q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float, window: int | None) -> Tensor:
    """Query by query; `starts` are the first tokens of the documents."""
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for t in range(q.shape[1]):
            first = max(start for start in starts if start <= t)
            first = first if window is None else max(first, t - window + 1)
            for head in range(q.shape[2]):
                key_head = head // (q.shape[2] // k.shape[2])
                shares = torch.softmax(k[row, first : t + 1, key_head] @ q[row, t, head] * scale, dim=0)
                out[row, t, head] = shares @ v[row, first : t + 1, key_head]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("starts", [[0], [0, 1, 9, 17]])
@pytest.mark.parametrize("chunk_queries", [1, 7, 128])
def test_heads_of_softmax_attention(
    window: int | None, starts: list[int], chunk_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_calibration, "_CHUNK_QUERIES", chunk_queries)
    q, k, v = torch.randn(2, 20, 6, 4), torch.randn(2, 20, 3, 4), torch.randn(2, 20, 3, 4)
    positions = torch.tensor([t - max(s for s in starts if s <= t) for t in range(20)]).expand(2, -1)
    found = softmax_heads(q, k, v, positions, scale=0.7, window=window)
    torch.testing.assert_close(found, heads_by_loops(q, k, v, starts, 0.7, window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_the_heads_that_are_fitted_are_the_teachers(model_type: str) -> None:
    layer = OneLayer(PLAIN, model_type)
    x = layer.hidden_states(1, 150)
    _, wanted = layer.mixer._heads(**call(layer, x))  # type: ignore[operator]
    torch.testing.assert_close(layer.view.o_proj(wanted.flatten(2)), layer.teacher(x), atol=1e-5, rtol=1e-5)


def test_channels_are_fitted_as_by_least_squares_over_all_that_was_added() -> None:
    pieces = [(torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)) for _ in range(3)]
    fit = ChannelFit()
    for x, y in pieces:
        fit.add(x, y)
    x, y = (torch.cat(parts).flatten(0, 1).double() for parts in zip(*pieces, strict=True))
    for head in range(3):
        error = 0.0
        for channel in range(4):
            solved = torch.linalg.lstsq(x[:, head, channel, None], y[:, head, channel, None])
            torch.testing.assert_close(fit.scale()[head, channel], solved.solution[0, 0])
            error += float((y[:, head, channel] - fit.scale()[head, channel] * x[:, head, channel]).square().sum())
        assert float(fit.error()[head]) == pytest.approx(error)


def test_a_silent_head_gets_a_scale_of_zero() -> None:
    fit = ChannelFit()
    fit.add(torch.zeros(1, 5, 2, 3), torch.randn(1, 5, 2, 3))
    assert torch.equal(fit.scale(), torch.zeros(2, 3, dtype=torch.float64))


def test_a_gate_that_made_the_heads_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_calibration, "_RIDGE", 1e-6)
    weight = torch.randn(3, 8)
    fit = GateFit()
    for _ in range(2):
        hidden, x = torch.randn(2, 40, 8), torch.randn(2, 40, 3, 5)
        fit.add(hidden, x, (1 + hidden @ weight.T / 2)[..., None] * x)
    torch.testing.assert_close(fit.weight(), weight, atol=1e-3, rtol=1e-3)


def test_a_gate_has_a_weight_with_fewer_tokens_than_inputs_and_of_a_silent_head() -> None:
    fit = GateFit()
    x = torch.randn(1, 3, 2, 4)
    x[:, :, 1] = 0
    fit.add(torch.randn(1, 3, 50), x, torch.randn(1, 3, 2, 4))
    assert fit.weight().isfinite().all()
    assert not fit.weight()[1].any()


def call(layer: OneLayer, x: Tensor, bounds: list[int] | None = None) -> dict[str, Any]:
    """Arguments of `forward` for a sequence."""
    tokens = x.shape[1]
    ends = [0, tokens] if bounds is None else bounds
    positions = torch.tensor([[t - max(b for b in ends if b <= t) for t in range(tokens)]])
    packed = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    return {"hidden_states": x, "position_embeddings": layer.rope(x, positions), **packed}


def error_of(layer: OneLayer, x: Tensor) -> float:
    wanted = layer.teacher(x)
    return float((layer(x) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@torch.no_grad()
def test_starts_nearer_to_the_teacher_on_other_text(config: GatedDeltaNetConfig, model_type: str) -> None:
    layer = OneLayer(config, model_type)
    calls = [call(layer, layer.hidden_states(1, 70)) for _ in range(6)]
    x = layer.hidden_states(1, 70)
    before = error_of(layer, x)
    layer.mixer.calibrate(calls)  # type: ignore[operator]
    after = error_of(layer, x)
    assert after < min(before, 1.0) * 0.9
    # Whatever was there before, the numbers are the same.
    found = {name: parameter.clone() for name, parameter in layer.mixer.new.named_parameters()}
    layer.disturb()
    layer.mixer.calibrate(calls)  # type: ignore[operator]
    for name, parameter in layer.mixer.new.named_parameters():
        assert torch.equal(parameter, found[name]), name


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_bfloat16_finds_as_good_a_start(config: GatedDeltaNetConfig) -> None:
    """A bf16 teacher under autocast, with new parameters in fp32, as in mixed training."""
    layer, mixed = OneLayer(config), OneLayer(config, dtype=torch.bfloat16)
    mixed.mixer.new.float()
    sequences = [layer.hidden_states(1, 60) for _ in range(3)]
    x = layer.hidden_states(2, 60)
    layer.mixer.calibrate([call(layer, x) for x in sequences])  # type: ignore[operator]
    exact = error_of(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed.mixer.calibrate([call(mixed, x.bfloat16()) for x in sequences])  # type: ignore[operator]
    assert all(parameter.dtype == torch.float32 for parameter in mixed.mixer.new.parameters())
    layer.mixer.new.load_state_dict(mixed.mixer.new.state_dict())
    assert error_of(layer, x) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("half_life", [1.0, 16.0, 256.0])
@torch.no_grad()
def test_finds_the_gates_and_scale_of_a_teacher_that_is_a_gated_delta_net(
    half_life: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = OneLayer(PLAIN)
    new = layer.mixer.new
    heads = len(new.decay_rate)
    betas = torch.tensor([0.3, 0.9]).repeat(heads)[:heads]
    inner = layer.mixer._heads  # type: ignore[operator]

    def of_a_delta_net(**arguments: Any) -> tuple[dict[str, Any], Tensor]:
        inputs, _ = inner(**arguments)
        new.set_gates(torch.full((heads,), half_life), betas)
        new.output_scale.fill_(2.5)
        return inputs, layer.mixer.mix(**inputs)[0]

    monkeypatch.setattr(layer.mixer, "_heads", of_a_delta_net)
    layer.mixer.calibrate([call(layer, layer.hidden_states(1, 300)) for _ in range(2)])  # type: ignore[operator]
    torch.testing.assert_close(new.output_scale, torch.full_like(new.output_scale, 2.5), atol=1e-4, rtol=1e-4)
    log_decay, beta = new.gates(layer.hidden_states(1, 1), None)
    torch.testing.assert_close(-math.log(2) / log_decay[0, 0], torch.full((heads,), half_life))
    torch.testing.assert_close(beta[0, 0], betas)


@torch.no_grad()
def test_packed_documents_count_as_sequences_of_their_own() -> None:
    layer = OneLayer(replace(PLAIN, short_convolution=4, output_gate=True))
    x = layer.hidden_states(1, 90)
    bounds = [0, 1, 30, 90]
    layer.mixer.calibrate([call(layer, x, bounds)])  # type: ignore[operator]
    packed = {name: parameter.clone() for name, parameter in layer.mixer.new.named_parameters()}
    pieces = [x[:, first:end] for first, end in pairwise(bounds)]
    layer.mixer.calibrate([call(layer, piece) for piece in pieces])  # type: ignore[operator]
    for name, parameter in layer.mixer.new.named_parameters():
        torch.testing.assert_close(packed[name], parameter, atol=1e-4, rtol=1e-4)


def test_the_grid_lies_where_beta_may_lie() -> None:
    assert all(half_life > 0 and 0 < beta < 1 for half_life, beta in CANDIDATES)
