"""Clipping is torch's, group by group; the norms are those before it."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import nn

from hybridize.distillation.gradients import clip


def groups(scale: float) -> list[list[nn.Parameter]]:
    """The same ones at every call."""
    torch.manual_seed(0)
    made = [[nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))], [nn.Parameter(torch.randn(4))]]
    for group in made:
        for parameter in group:
            parameter.grad = scale * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clip_is_that_of_torch(scale: float) -> None:
    found, expected = groups(scale), groups(scale)
    each = torch.stack([parameter.grad.norm() for group in found for parameter in group])  # type: ignore[union-attr]
    norms = clip(found, 0.5, lambda squares: squares)
    totals = torch.stack([nn.utils.clip_grad_norm_(group, 0.5) for group in expected])
    for parameter, wanted in zip(chain(*found), chain(*expected), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad)
    torch.testing.assert_close(norms.total, totals.norm())
    torch.testing.assert_close(norms.each, each)
    assert [id(parameter) for parameter in norms.parameters] == [id(p) for group in found for p in group]


def test_parameters_without_a_gradient_do_not_count() -> None:
    found = groups(1.0)
    found[0][0].grad = None
    found.append([nn.Parameter(torch.ones(2))])
    norms = clip(found, 1.0, lambda squares: squares)
    assert norms.parameters == (found[0][1], found[1][0])
    assert found[0][0].grad is None
    assert float(found[0][1].grad.norm()) <= 1.0 + 1e-6  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_norm_and_in_the_total(bad: float) -> None:
    found = groups(1.0)
    found[0][1].grad[2] = bad  # type: ignore[index]
    norms = clip(found, 1.0, lambda squares: squares)
    assert norms.each.isfinite().tolist() == [True, False, True]
    assert not norms.total.isfinite()
    assert found[1][0].grad.isfinite().all(), "the other group is a mixer of its own"  # type: ignore[union-attr]
