"""Documents packed into one row: positions, sums, and what the eviction budget and its scorer make of them."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.budget_controller import BudgetController
from hybridize.mixers.parts.documents import (
    document_counts,
    document_of_tokens,
    document_positions,
    document_sums,
    kth_largest_of_texts,
    largest_of_texts,
    sums_of_texts,
)
from hybridize.mixers.parts.future_attention import retention_target_loss
from tests.mixers.one_layer import OneLayer


def bounds_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_tokens_know_their_document_and_place(lengths: list[int]) -> None:
    total = sum(lengths)
    expected = [(number, place) for number, length in enumerate(lengths) for place in range(length)]
    bounds = bounds_of(*lengths)
    assert document_of_tokens(bounds, total).tolist() == [number for number, _ in expected]
    assert document_positions(bounds, total).tolist() == [[place for _, place in expected]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_sums_are_those_of_each_document(lengths: list[int], seed: int) -> None:
    x = 100 * torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    bounds = bounds_of(*lengths)
    parts = x.split(lengths)
    expected = torch.stack([part.double().sum(0) for part in parts]).float()
    torch.testing.assert_close(document_sums(x, bounds), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(document_counts(x > 0, bounds), torch.stack([(part > 0).sum(0) for part in parts]))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 10), st.integers(0, 9))
def test_texts_are_documents_or_rows(lengths: list[int], k: int, seed: int) -> None:
    x = torch.randn(1, sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    for of_texts in (
        lambda x, bounds: sums_of_texts(x, bounds),
        lambda x, bounds: sums_of_texts(x > 0, bounds),
        lambda x, bounds: largest_of_texts(x.abs(), bounds),
        lambda x, bounds: kth_largest_of_texts(x, k, bounds),
        lambda x, bounds: kth_largest_of_texts(torch.zeros_like(x), k, bounds),  # all equal
    ):
        alone = [of_texts(part, None).expand_as(part) for part in x.split(lengths, dim=1)]
        torch.testing.assert_close(of_texts(x, bounds_of(*lengths)), torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_the_kth_largest_counts_from_one() -> None:
    x = torch.tensor([3.0, 1.0, 2.0]).view(1, 3, 1)
    assert [kth_largest_of_texts(x, k, None).item() for k in (1, 2, 3, 4)] == [3, 2, 1, -torch.inf]


def controller(**changes: int) -> BudgetController:
    sizes = {"window_tokens": 16, "budget_tokens": 8, "sink_tokens": 2, "l1_every_steps": 1}
    made = BudgetController(TokenEvictionConfig(**{**sizes, **changes}), 2)
    made.initialise()
    return made


def test_a_step_may_see_documents_and_whole_rows() -> None:
    made = controller(l1_every_steps=32)
    made.observe(torch.tensor([0.5, 0.25]), 40)
    made.observe(torch.tensor([30.0, 10.0]) / 60, torch.tensor(60.0))
    made.after_step(8)
    # From the mean length, 50 tokens, it follows at 2 / 17 towards 25 and 10.
    assert made.num_kept.tolist() == pytest.approx([50 - 25 * 2 / 17, 50 - 40 * 2 / 17])


def test_the_target_is_standardised_in_each_document() -> None:
    lengths = (9, 1, 20)
    bounds, total = bounds_of(*lengths), sum(lengths)
    logit, future = torch.randn(1, total, 2), torch.randn(1, total, 2)
    future[:, [4, 9, 29]] = -torch.inf
    positions = document_positions(bounds, total)
    loss = retention_target_loss(logit, future, positions, sinks=2, cu_seqlens=bounds)
    known = future.isfinite() & (positions >= 2)[..., None]
    alone = [
        retention_target_loss(logit[:, a:b], future[:, a:b], positions[:, a:b], sinks=2) * known[:, a:b].sum()
        for a, b in pairwise(bounds.tolist())
    ]
    torch.testing.assert_close(loss, sum(alone) / known.sum(), rtol=1e-5, atol=1e-6)


def test_the_align_stage_learns_from_each_document_alone() -> None:
    config = TokenEvictionConfig(window_tokens=8, budget_tokens=12, sink_tokens=2, scorer_dropout=0.0)
    layer = OneLayer(config)
    mixer = layer.mixer.train()
    lengths = (30, 3, 24)
    bounds, total = bounds_of(*lengths), sum(lengths)
    x = layer.hidden_states(1, total)
    targets = mixer.align_targets(x, layer.rope(x, document_positions(bounds, total)), bounds)
    for a, b in pairwise(bounds.tolist()):
        part = x[:, a:b]
        alone = mixer.align_targets(part, layer.rope(part, torch.arange(b - a)[None]))
        assert torch.equal(targets.future[:, a:b].isfinite(), alone.future.isfinite())
        assert torch.equal(targets.positions[:, a:b], alone.positions)
        torch.testing.assert_close(targets.future[:, a:b], alone.future, rtol=1e-5, atol=1e-5)
    mixer.align_loss(targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.new.parameters())
    assert mixer.auxiliary["eviction_budget"].isfinite()
