"""Soft gates on what has left the window: dense attention with log g on the logits, and a loss that closes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybridize.errors import RecipeError
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.soft_retention import concrete_log_gates, soft_budget_loss, softly_retained_attention
from hybridize_kernels import retained_attention, use_implementation
from hybridize_kernels.dispatch import Implementation

WINDOW, SINKS, SCALE = 7, 3, 0.3


def dense(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """softmax over all keys j <= i of scale q·k, plus log g_j where i - j >= WINDOW and j is no sink."""
    group = q.shape[2] // k.shape[2]
    k, v, log_gate = (x.repeat_interleave(group, dim=2) for x in (k, v, log_gate))
    position = torch.arange(q.shape[1])
    distance = position[:, None] - position
    gated = (distance >= WINDOW) & (position >= SINKS)
    logit = SCALE * torch.einsum("bihd,bjhd->bhij", q, k) + gated * log_gate.transpose(1, 2)[:, :, None]
    return torch.einsum("bhij,bjhd->bihd", logit.masked_fill(distance < 0, -torch.inf).softmax(-1), v)


def inputs(num_tokens: int) -> list[Tensor]:
    torch.manual_seed(num_tokens)
    shapes = [(2, num_tokens, heads, 16) for heads in (6, 2, 2)]
    tensors = [torch.randn(shape) for shape in shapes] + [functional.logsigmoid(3 * torch.randn(2, num_tokens, 2))]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("form", ["reference", "eager"])
@pytest.mark.parametrize("num_tokens", [1, WINDOW, WINDOW + 1, 40])
def test_is_dense_attention_with_gates_on_the_past(num_tokens: int, form: Implementation) -> None:
    q, k, v, log_gate = inputs(num_tokens)
    with use_implementation(form):
        out = softly_retained_attention(q, k, v, log_gate, window=WINDOW, sinks=SINKS, scale=SCALE)
        expected = dense(q, k, v, log_gate)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        d_out = torch.randn_like(out)
        found = torch.autograd.grad(out, (q, k, v, log_gate), d_out, allow_unused=True)
        wanted = torch.autograd.grad(expected, (q, k, v, log_gate), d_out)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other, atol=1e-5, rtol=1e-4)


def test_open_gates_are_full_attention_and_closed_ones_a_window_with_sinks() -> None:
    q, k, v, _ = (tensor.detach() for tensor in inputs(40))
    gates = {0.0: retained_attention(q, k, v, window=40, scale=SCALE)}
    gates[-1e4] = retained_attention(q, k, v, window=WINDOW, sinks=SINKS, scale=SCALE)
    for log_gate, expected in gates.items():
        shut = torch.full((2, 40, 2), log_gate)
        out = softly_retained_attention(q, k, v, shut, window=WINDOW, sinks=SINKS, scale=SCALE)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_gates_harden_as_the_temperature_falls() -> None:
    torch.manual_seed(0)
    logit = torch.randn(50_000)
    between = []
    for temperature in (1.0, 0.3, 0.1):
        gate = concrete_log_gates(logit, temperature).exp()
        between.append(((gate > 0.01) & (gate < 0.99)).float().mean().item())
        # Whatever the temperature, a gate is more open than shut with the probability of the logit.
        assert (gate > 0.5).float().mean().item() == pytest.approx(torch.sigmoid(logit).mean().item(), abs=0.01)
    assert between[0] > 1.5 * between[1] > 3 * between[2]


def test_the_loss_is_what_a_head_keeps_beyond_its_budget() -> None:
    logit = torch.stack((torch.full((2, 10), 20.0), torch.full((2, 10), -20.0)), dim=2).requires_grad_()
    assert soft_budget_loss(logit, 4).item() == pytest.approx((1.0 - 0.4) / 2, abs=1e-6)
    assert soft_budget_loss(logit, 11).item() == 0.0
    half = torch.zeros(1, 10, 1, requires_grad=True)
    loss = soft_budget_loss(half, 2)
    assert loss.item() == pytest.approx(0.3)
    loss.backward()
    assert (half.grad > 0).all()


def test_a_soft_gate_holds_its_budget_by_its_own_loss() -> None:
    with pytest.raises(RecipeError, match="a soft gate has a loss of its own"):
        TokenEvictionConfig(score_gradient="soft", budget_control="threshold")
