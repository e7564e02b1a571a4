"""The align stage's target: attention that a token receives after it has left the window."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.future_attention import (
    HEADROOM,
    PROBABILITY_THRESHOLD,
    PROBABILITY_UNIT,
    future_attention,
    retention_target_loss,
)
from hybridize_kernels import use_implementation
from hybridize_kernels.dispatch import Implementation
from tests.mixers.one_layer import OneLayer

WINDOW = 4


def by_hand(q: Tensor, k: Tensor, positions: list[int], window: int, scale: float) -> list[list[float]]:
    """One row: q [T, HQ, D], k [T, H, D] -> [T][H] of the largest log probability, -inf where there is none."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    best = [[-math.inf] * heads for _ in positions]
    for i, query in enumerate(positions):
        seen = [j for j, key in enumerate(positions) if 0 <= key <= query]
        for head in range(q.shape[1]):
            if not seen:
                continue
            probability = (k[seen, head // group] @ q[i, head] * scale).softmax(-1)
            for j, p in zip(seen, probability.tolist(), strict=True):
                if query - positions[j] >= window:
                    best[j][head // group] = max(best[j][head // group], math.log(p))
    return best


@pytest.mark.parametrize("form", ["reference", "eager", "triton"])
def test_is_the_largest_probability_from_outside_the_window(form: Implementation) -> None:
    q, k = torch.randn(2, 15, 4, 8), torch.randn(2, 15, 2, 8)
    positions = torch.stack([torch.arange(15), (torch.arange(15) - 5).clamp(min=-1)])
    with use_implementation(form):
        future = future_attention(q, k, window=WINDOW, positions=positions, scale=0.3)
        unpadded = future_attention(q[:1], k[:1], window=WINDOW, positions=None, scale=0.3)
    torch.testing.assert_close(unpadded, future[:1])
    for row in range(2):
        expected = torch.tensor(by_hand(q[row], k[row], positions[row].tolist(), WINDOW, 0.3))
        torch.testing.assert_close(future[row], expected, atol=1e-5, rtol=1e-5)


def test_target_is_the_standardised_attention_above_the_threshold() -> None:
    future = torch.randn(2, 30, 3)
    future[:, 26:] = -torch.inf
    positions = torch.arange(30).expand(2, -1)
    asked = future[:, 4:26]
    deviation, mean = torch.std_mean(asked, dim=1, correction=0, keepdim=True)
    target = torch.zeros_like(future)
    target[:, 4:26] = HEADROOM + (asked - mean) / deviation
    assert retention_target_loss(target, future, positions, sinks=4).item() < 1e-12

    logit = torch.randn(2, 30, 3, requires_grad=True)
    loss = retention_target_loss(logit, future, positions, sinks=4)
    assert loss.item() == pytest.approx(((logit - target)[:, 4:26] ** 2).mean().item(), rel=1e-5)
    loss.backward()
    assert logit.grad[:, 4:26].all()
    assert not logit.grad[:, :4].any(), "sinks are not asked"
    assert not logit.grad[:, 26:].any(), "nor what no later query saw"


def test_short_texts_have_no_target() -> None:
    logit = torch.zeros(1, 3, 2, requires_grad=True)
    future = future_attention(
        torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8), window=WINDOW, positions=torch.arange(3)[None], scale=1.0
    )
    loss = retention_target_loss(logit, future, torch.arange(3)[None], sinks=1)
    loss.backward()
    assert loss.item() == 0.0
    assert not logit.grad.any()


def test_the_loss_alone_teaches_what_to_keep() -> None:
    config = TokenEvictionConfig(window_tokens=8, budget_tokens=12, sink_tokens=2, scorer_dropout=0.0)
    layer = OneLayer(config)
    mixer = layer.mixer.train()
    x = layer.hidden_states(2, 64)
    targets = mixer.align_targets(x, layer.rope(x, torch.arange(64)[None]))

    def error_of_output() -> float:
        with torch.no_grad():
            mixer.eval()
            error = float((layer(x) - layer.teacher(x)).square().mean())
            mixer.train()
        return error

    before = error_of_output()
    optimiser = torch.optim.AdamW(mixer.new.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = mixer.align_loss(targets)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    assert error_of_output() < 0.9 * before


def test_the_probability_target_is_met_by_its_log_odds() -> None:
    probability = torch.rand(2, 30, 3) * 0.98 + 0.01
    future = probability.log()
    future[:, 26:] = -torch.inf
    positions = torch.arange(30).expand(2, -1)
    logit = ((probability.logit() + PROBABILITY_THRESHOLD) / PROBABILITY_UNIT).requires_grad_()
    loss = retention_target_loss(logit, future, positions, sinks=4, target="probability")
    loss.backward()
    assert logit.grad.abs().max() < 1e-8, "the loss is at its least where odds say the probability"
    entropy = -(probability * probability.log() + (1 - probability) * (1 - probability).log())
    assert loss.item() == pytest.approx(entropy[:, 4:26].mean().item(), rel=1e-5)

    further = retention_target_loss(logit.detach() + 1, future, positions, sinks=4, target="probability")
    assert further > loss


def test_the_targets_rank_a_rare_glance_of_everything_differently() -> None:
    """A token that one text in ten looks at with all of a query's attention, and one that each looks at a little."""
    rare, steady = torch.full((10,), 1e-5), torch.full((10,), 1e-3)
    rare[0] = 0.9
    assert rare.log().mean() < steady.log().mean()
    assert rare.mean() > steady.mean()
    logit = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.1)
    future = torch.stack((rare, steady), dim=1).log()[:, None]  # ten texts of one token
    for _ in range(300):
        optimizer.zero_grad()
        rows = logit.expand(10, 1, 2)
        retention_target_loss(rows, future, torch.zeros(10, 1), sinks=0, target="probability").backward()
        optimizer.step()
    assert logit[0] > logit[1]


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_students_learn_from_their_own_future_attention_where_it_has_a_weight(weight: float) -> None:
    config = TokenEvictionConfig(
        window_tokens=8,
        budget_tokens=12,
        sink_tokens=2,
        scorer_dropout=0.0,
        score_gradient="none",
        future_attention=weight,
    )
    layer = OneLayer(config)
    layer.mixer.train()
    torch.manual_seed(1)
    x = layer.hidden_states(1, 40)
    layer(x)
    loss = layer.mixer.auxiliary.get("retention_target")
    if weight == 0.0:
        assert loss is None
        return
    targets = layer.mixer.align_targets(x, layer.rope(x, torch.arange(40)[None]))
    assert loss.item() == pytest.approx(weight * layer.mixer.align_loss(targets).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.mixer.new.scorer.parameters())
