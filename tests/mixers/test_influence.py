"""Scores regressed on their influence on the loss: what the backward pass of attention says, by its logarithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridize.errors import RecipeError
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.future_attention import HEADROOM
from hybridize.mixers.parts.influence import regressed_on_influence
from hybridize_kernels import use_implementation
from tests.mixers.one_layer import OneLayer

CONFIG = TokenEvictionConfig(
    window_tokens=8,
    budget_tokens=12,
    sink_tokens=2,
    scorer_dropout=0.0,
    score_gradient="none",
    influence=1.0,
)


def test_the_gradient_of_a_score_becomes_the_gradient_of_a_regression() -> None:
    score, logit = torch.randn(2, 5, 3), torch.randn(2, 5, 3, requires_grad=True)
    influence = torch.rand(2, 5, 3) + 0.1
    asked: list[Tensor] = []

    def loss(free: Tensor, target: Tensor) -> Tensor:
        asked.append(target)
        return (free - target).square().sum()

    taught, stand_in = regressed_on_influence(score, logit, loss)
    assert taught.equal(score)
    assert stand_in.item() == 0
    torch.autograd.backward((taught, stand_in), (influence, torch.tensor(0.25)))
    assert asked[0].equal(influence.log())
    torch.testing.assert_close(logit.grad, 0.25 * 2 * (logit.detach() - influence.log()))


def test_a_share_of_a_step_is_a_share_of_the_regression() -> None:
    """As `stages` has it: the loss and the auxiliary losses of a micro-batch, by its share of the step."""
    gradients = []
    for share in (1.0, 0.25):
        torch.manual_seed(0)
        layer = OneLayer(CONFIG)
        x = layer.hidden_states(1, 60)
        out = layer.mixer.train()(x, layer.rope(x, torch.arange(60)[None]))[0]
        loss = out.square().sum() + sum(layer.mixer.auxiliary.values())
        (loss * share).backward()
        gradients.append([parameter.grad for parameter in layer.mixer.new.scorer.parameters()])
    for whole, part in zip(*gradients, strict=True):
        assert whole.any()
        torch.testing.assert_close(part, 0.25 * whole, rtol=1e-4, atol=1e-7)


def test_logits_learn_the_standardised_logarithm_of_the_largest_influence() -> None:
    layer = OneLayer(CONFIG)
    mixer = layer.mixer.train()
    x = layer.hidden_states(1, 60)
    with torch.no_grad():
        direction = torch.randn(1, 60, x.shape[-1])

    heard: list[Tensor] = []
    inner = mixer._influence_loss

    def listening(logit: Tensor, influence: Tensor, **places: Tensor) -> Tensor:
        heard[:] = [logit, influence]
        return inner(logit, influence, **places)

    mixer._influence_loss = listening
    (layer(x) * direction).sum().backward()
    logit, influence = heard
    known = influence.isfinite()
    assert not known[:, :2].any(), "sinks stay whatever their score"
    assert not known[:, 60 - 8 :].any(), "no query is far from these"
    assert known[:, 2 : 60 - 8].all()
    target = influence[:, 2 : 60 - 8 - 0]
    wanted = HEADROOM + (target - target.mean(1, keepdim=True)) / target.std(1, correction=0, keepdim=True)
    expected = (logit[:, 2 : 60 - 8] - wanted).square().mean()
    found = inner(logit, influence, positions=torch.arange(60)[None], cu_seqlens=None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("form", ["eager", "triton"])
def test_a_token_that_the_loss_needs_rises(form: str) -> None:
    layer = OneLayer(CONFIG)
    mixer = layer.mixer.train()
    x = layer.hidden_states(1, 40)
    teacher = layer.teacher(x).detach()
    optimiser = torch.optim.Adam(mixer.new.scorer.parameters(), lr=1e-2)
    losses = []
    with use_implementation(form):
        for _ in range(25 if form == "eager" else 3):
            optimiser.zero_grad()
            loss = (layer(x) - teacher).square().sum()
            (loss + mixer.auxiliary["eviction_budget"]).backward()
            losses.append(loss.item())
            assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.new.scorer.parameters())
            assert any(p.grad.any() for p in mixer.new.scorer.parameters())
            optimiser.step()
    if form == "eager":
        assert min(losses[-5:]) < 0.95 * losses[0]


def test_it_takes_the_place_of_a_gradient() -> None:
    with pytest.raises(RecipeError, match="must be none beside influence"):
        TokenEvictionConfig(influence=1.0)
    with pytest.raises(RecipeError, match="must be zero or positive"):
        TokenEvictionConfig(influence=-1.0, score_gradient="none")
