"""Losses against their definitions, the schedule against its corner points."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from hybridize.distillation.losses import Head, cross_entropy, distillation_terms, next_tokens, relative_error
from hybridize.distillation.schedule import learning_rate_factor, learning_rates, ramp_progress
from hybridize.recipe.schema import Loss, Ramp, Stage
from hybridize_kernels import distillation_loss


def heads() -> tuple[Head, Head, torch.Tensor]:
    student = Head(torch.randn(2, 9, 6, requires_grad=True), torch.randn(11, 6))
    teacher = Head(torch.randn(2, 9, 6), torch.randn(11, 6))
    return student, teacher, torch.randint(0, 11, (2, 9))


def test_relative_error_is_one_for_silence_and_zero_for_the_target() -> None:
    target = torch.randn(3, 4)
    assert relative_error(torch.zeros(3, 4), target) == pytest.approx(1.0)
    assert relative_error(target, target) == 0
    assert relative_error(3 * target, target) == pytest.approx(4.0)
    assert torch.isfinite(relative_error(target, torch.zeros(3, 4)))


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_cross_entropy_equals_that_of_whole_logits(chunk: int) -> None:
    student, _, tokens = heads()
    loss = cross_entropy(student, next_tokens(tokens), chunk_tokens=chunk)
    logits = student.hidden[:, :-1] @ student.weight.T
    expected = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, student.hidden, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_cross_entropy_of_one_token_is_zero() -> None:
    tokens = torch.zeros(1, 1, dtype=torch.long)
    assert cross_entropy(Head(torch.randn(1, 1, 6), torch.randn(11, 6)), next_tokens(tokens)) == 0


def test_losses_do_not_depend_on_how_sequences_are_cut_into_micro_batches() -> None:
    student, teacher, tokens = heads()
    continues = torch.rand(tokens.shape) > 0.4  # another number of labels in each
    continues[:, 0] = True
    labels = next_tokens(tokens, continues)
    settings = Loss(kl=0.5, hidden=2.0, cross_entropy=0.25)

    def loss(rows: slice) -> torch.Tensor:
        parts = (Head(head.hidden[rows].flatten(0, 1)[None], head.weight) for head in (student, teacher))
        total, _ = distillation_terms(settings, *parts, labels[rows], sequences=len(labels[rows]))
        return total

    one_by_one = torch.stack([loss(slice(row, row + 1)) for row in range(len(labels))]).mean()
    torch.testing.assert_close(loss(slice(None)), one_by_one)
    uneven = relative_error(student.hidden[:2] * torch.tensor([1.0, 9.0])[:, None, None], teacher.hidden[:2], 2)
    each = [
        relative_error(student.hidden[0], teacher.hidden[0]),
        relative_error(9 * student.hidden[1], teacher.hidden[1]),
    ]
    torch.testing.assert_close(uneven, torch.stack(each).mean())


@pytest.mark.parametrize("direction", ["forward", "reverse", "mixed"])
def test_terms_are_weighted_and_measured(direction: str) -> None:
    student, teacher, tokens = heads()
    settings = Loss(kl=0.5, hidden=2.0, cross_entropy=0.25, direction=direction, temperature=1.5)  # type: ignore[arg-type]
    loss, measured = distillation_terms(settings, student, teacher, next_tokens(tokens))
    expected = 0.5 * measured["kl"] + 2.0 * measured["hidden"] + 0.25 * measured["cross_entropy"]
    torch.testing.assert_close(loss.detach(), expected)
    log_p = (teacher.hidden @ teacher.weight.T / 1.5).log_softmax(-1)
    log_q = (student.hidden @ student.weight.T / 1.5).log_softmax(-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    kl = 1.5**2 * {"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}[direction]
    torch.testing.assert_close(measured["kl"], kl.detach())
    assert not any(value.requires_grad for value in measured.values())


def test_unweighted_divergence_is_measured_but_not_learnt() -> None:
    student, teacher, tokens = heads()
    loss, measured = distillation_terms(Loss(kl=0.0, cross_entropy=1.0), student, teacher, next_tokens(tokens))
    torch.testing.assert_close(loss.detach(), measured["cross_entropy"])
    assert measured["kl"] > 0
    assert "hidden" not in measured


def test_unweighted_divergence_has_no_gradient_and_is_taken_only_to_be_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher, tokens = heads()
    asked = []

    def spy(hidden: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(hidden.requires_grad)
        return distillation_loss(hidden, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("hybridize.distillation.losses.distillation_loss", spy)
    adapt = Loss(kl=0.0, cross_entropy=1.0)
    with_kl, _ = distillation_terms(adapt, student, teacher, next_tokens(tokens), measure=True)
    assert asked == [False]
    without, measured = distillation_terms(adapt, student, teacher, next_tokens(tokens), measure=False)
    assert asked == [False]
    assert set(measured) == {"cross_entropy"}
    assert torch.equal(with_kl, without)
    _, measured = distillation_terms(Loss(), student, teacher, next_tokens(tokens), measure=False)
    assert asked == [False, True]
    assert set(measured) == {"kl", "agreement"}


def test_same_model_agrees_with_itself() -> None:
    student, _, tokens = heads()
    loss, measured = distillation_terms(Loss(), student, student, tokens)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert measured["agreement"] == 1


def test_learning_rate_warms_up_and_falls_to_its_share() -> None:
    stage = Stage("s", "distill", steps=101, learning_rate=2.0, warmup_steps=4, final_share=0.1)
    assert [learning_rate_factor(stage, step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert learning_rate_factor(stage, 4) == 1
    assert learning_rate_factor(stage, 52) == pytest.approx(0.55)
    assert learning_rate_factor(stage, 100) == pytest.approx(0.1)
    factors = [learning_rate_factor(stage, step) for step in range(4, 101)]
    assert factors == sorted(factors, reverse=True)
    assert learning_rate_factor(Stage("s", "distill", steps=1), 0) == 1


def test_old_weights_have_their_own_peak() -> None:
    stage = Stage("s", "distill", steps=2, learning_rate=1.0, projection_learning_rate=0.25)
    assert learning_rates(stage, 0) == {"mixers": 1.0, "projections": 0.25, "adapters": 0.25}
    assert set(learning_rates(Stage("s", "align", steps=2, learning_rate=0.5), 0).values()) == {0.5}


def test_ramp_runs_between_its_shares() -> None:
    assert ramp_progress(None, 0, 10) == 1
    progress = [ramp_progress(Ramp(0.2, 0.6), step, 11) for step in range(11)]
    assert progress == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert not math.isnan(ramp_progress(Ramp(0.0, 1.0), 0, 1))
