"""The gradient of choosing the best: that of a soft top-k, in which tokens compete for places."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.soft_top_k import soft_top_k
from tests.mixers.one_layer import OneLayer

TOKENS, HEADS, PLACES = 30, 3, 6


def learnt(
    logit: Tensor,
    gradient: Tensor,
    among: Tensor,
    *,
    places: int = PLACES,
    share: float = 1.0,
    bounds: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits [B, T, H] for a gradient of the scores."""
    logit = logit.clone().requires_grad_()
    score = torch.randn_like(logit)
    given_back, stand_in = soft_top_k(score, logit, among, places=places, cu_seqlens=bounds)
    assert given_back.equal(score)
    assert stand_in.item() == 0
    torch.autograd.backward((given_back, stand_in), (gradient, torch.tensor(share)))
    assert logit.grad is not None
    return logit.grad


def case(seed: int, batch: int = 2, offset: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, all above zero, gradients, and which tokens compete: not the first ones, nor the last."""
    made = torch.Generator().manual_seed(seed)
    logit, gradient = (torch.randn(batch, TOKENS, HEADS, generator=made) for _ in range(2))
    among = torch.zeros(batch, TOKENS, 1, dtype=torch.bool)
    among[:, 2:-4] = True
    return offset + logit, gradient, among


def soft_choice(x: Tensor, total: Tensor) -> Tensor:
    """sigmoid(x - t) [T, H] in fp64, with t such that it adds up to `total` [H]; by bisection."""
    low, high = x.amin(0) - 50, x.amax(0) + 50
    for _ in range(200):
        t = (low + high) / 2
        more = torch.sigmoid(x - t).sum(0) > total
        low, high = torch.where(more, t, low), torch.where(more, high, t)
    return torch.sigmoid(x - t)


def test_it_is_the_gradient_of_a_soft_top_k() -> None:
    """By differences: of the soft choice whose probabilities add up to what they do at the edge of the hard one."""
    logit, gradient, among = case(0, batch=1)
    found = learnt(logit, gradient, among)[0, 2:-4].double()
    x, g = (value[0, 2:-4].double() for value in (logit, gradient))
    edge = x.topk(PLACES, dim=0).values[-1]
    total = torch.sigmoid(x - edge).sum(0)
    torch.testing.assert_close(soft_choice(x, total), torch.sigmoid(x - edge))
    step = 1e-4
    for token in range(len(x)):
        moved = torch.zeros_like(x)
        moved[token] = step
        change = (soft_choice(x + moved, total) - soft_choice(x - moved, total)) / (2 * step)
        of_loss = (g * change).sum(0) / g.square().mean(0).sqrt() / g.numel()
        torch.testing.assert_close(found[token], of_loss, rtol=1e-3, atol=1e-7)


@given(st.integers(0, 99), st.integers(1, TOKENS - 6))
def test_what_some_gain_others_lose(seed: int, places: int) -> None:
    logit, gradient, among = case(seed, offset=9.0)
    found = learnt(logit, gradient, among, places=places)
    torch.testing.assert_close(found.sum(1), torch.zeros(2, HEADS), rtol=0, atol=1e-6)
    assert not found[~among.expand_as(found)].any()
    assert found[among.expand_as(found)].any()


@pytest.mark.parametrize(("places", "offset"), [(TOKENS, 3.0), (TOKENS - 6 + 1, 3.0), (PLACES, -9.0)])
def test_nobody_competes_where_places_are_left(places: int, offset: float) -> None:
    """There are more than tokens, or than tokens above zero: every token is judged by itself, from zero on."""
    logit, gradient, among = case(1, offset=offset)
    found = learnt(logit, gradient, among, places=places)
    p = torch.sigmoid(logit)
    g = gradient.masked_fill(~among, 0.0)
    size = (g.square().sum(1, keepdim=True) / (TOKENS - 6)).sqrt()
    torch.testing.assert_close(found, p * (1 - p) * g / size / (2 * (TOKENS - 6) * HEADS))


def test_the_size_of_the_loss_does_not_matter_and_its_share_does() -> None:
    logit, gradient, among = case(2)
    once = learnt(logit, gradient, among)
    torch.testing.assert_close(learnt(logit, 1e-20 * gradient, among), once)
    torch.testing.assert_close(learnt(logit, torch.tensor([[[1e8]], [[1e-8]]]) * gradient, among), once)
    torch.testing.assert_close(learnt(logit, gradient, among, share=0.25), 0.25 * once)
    assert not learnt(logit, torch.zeros_like(gradient), among).any()


def test_tokens_that_are_used_a_little_fall_beside_one_that_is_needed() -> None:
    """Each by itself, they would all rise: a line that comes again and again is used a little every time."""
    logit = torch.full((1, TOKENS, 1), 1.0)
    gradient = torch.full((1, TOKENS, 1), -0.01)  # of the loss: showing them lowers it
    gradient[:, 7] = -1.0
    found = learnt(logit, gradient, torch.ones(1, TOKENS, 1, dtype=torch.bool))[0, :, 0]
    assert found[7] < 0
    assert (found[:7] > 0).all()
    assert (found[8:] > 0).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 9))
def test_packed_documents_learn_as_they_do_alone(lengths: list[int], seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    logit = 1 + 2 * torch.randn(1, total, HEADS, generator=made)
    gradient = torch.randn(1, total, HEADS, generator=made)
    among = torch.rand(1, total, 1, generator=made) < 0.8
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    packed = learnt(logit, gradient, among, places=3, bounds=bounds)
    parts = zip(*(x.split(lengths, dim=1) for x in (logit, gradient, among)), strict=True)
    alone = [learnt(*part, places=3) * part[2].sum() / among.sum().clamp(min=1) for part in parts]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_the_mixer_lets_tokens_compete_that_leave_its_window(padded: bool) -> None:
    config = TokenEvictionConfig(
        window_tokens=8, budget_tokens=6, sink_tokens=2, scorer_dropout=0.0, future_attention=0.0
    )
    assert (config.score_gradient, config.score_relaxation) == ("counterfactual", "top_k")
    layer = OneLayer(config)
    mixer = layer.mixer.train()
    made: list[Tensor] = []
    inner = mixer._logits
    mixer._logits = lambda *args: made.append(inner(*args)) or made[-1]
    positions = torch.arange(40).expand(2, -1)
    if padded:
        positions = torch.stack([torch.arange(40), torch.arange(40) - 5]).clamp(min=-1)
    loss = layer(layer.hidden_states(2, 40), None, positions).square().sum() + sum(mixer.auxiliary.values())
    (of_logit,) = torch.autograd.grad(loss, made)
    expected = (positions >= 2) & (positions < positions[:, -1:] - 8 + 1)
    assert torch.equal(of_logit.any(-1), expected)
    torch.testing.assert_close(of_logit.sum(1), torch.zeros(2, layer.geometry.num_key_heads), rtol=0, atol=1e-6)
