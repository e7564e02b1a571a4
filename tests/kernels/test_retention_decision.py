"""The decision on each token: eager and Triton against its rule, text by text."""

from functools import partial

import pytest
import torch

from hybridize_kernels import retention_decision, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

VARIABLE = "HYBRIDIZE_RETENTION_DECISION"
SMALL_TILES = "32,4,3"
"""Several tiles a program, and several programs."""

MARGIN = 3


def packed(*lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def texts_of(case, time, device="cpu"):
    """Rows, and what tells the texts: nothing, positions with padding before and between, or bounds of documents."""
    if case == "documents":
        return 1, {"cu_seqlens": packed(2, 0, time // 2, 1, time - time // 2 - 3, device=device), "longer_than": 8}
    if case == "short documents":
        return 1, {"cu_seqlens": packed(time - 4, 4, device=device), "longer_than": time}
    if case == "padding":
        real = torch.stack([torch.arange(time) % 5 != 2, torch.arange(time) >= 4, torch.arange(time) < 0])
        return 3, {"positions": torch.where(real, real.cumsum(1) - 1, -1).to(device)}
    return 2, {}


CASES = ("rows", "padding", "documents", "short documents")


def decide(logit, l1_weight, *, score="sigmoid", **options):
    """On a coarse grid: where fp32 and fp64 round to different steps of a fine one, both are right."""
    return retention_decision(
        logit, l1_weight, **{"score": score, "steps_per_unit": 16.0, "margin": MARGIN, "l1_margin": 0.0, **options}
    )


def make_logits(case, time, heads=3, *, dtype=torch.float64, device="cpu"):
    batch, texts = texts_of(case, time, device)
    return 2 * torch.randn(batch, time, heads, dtype=torch.float64).to(device, dtype), texts


def outputs(logit, l1_weight, texts, **options):
    """Decisions and loss, the loss times a number of the order of the tokens, that its gradient shows."""
    made = decide(logit, l1_weight, **texts, **options)
    return made.decided, 100 * made.budget_loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("score", "l1_margin"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("relu", 0.0)])
@pytest.mark.parametrize("time", [5, 33])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_equal_the_rule(case, score, l1_margin, time, dtype, device):
    logit, texts = make_logits(case, time, dtype=dtype, device=device)
    l1_weight = torch.rand(3, device=device)
    assert_form_agrees(partial(outputs, l1_weight=l1_weight, texts=texts, score=score, l1_margin=l1_margin), [logit])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("score", "l1_margin"), [("sigmoid", 0.1), ("relu", 0.0)])
@pytest.mark.parametrize(("time", "heads", "weights"), [(5, 1, 1), (33, 3, 3), (40, 5, 1)])
def test_the_kernels_equal_the_rule(case, score, l1_margin, time, heads, weights, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    logit, texts = make_logits(case, time, heads, dtype=torch.float32, device=kernel_device)
    l1_weight = torch.rand(weights, device=kernel_device)
    op = partial(outputs, l1_weight=l1_weight, texts=texts, score=score, l1_margin=l1_margin)
    assert_form_agrees(op, [logit], form="triton")


@pytest.mark.parametrize("case", CASES)
def test_every_form_counts_the_same_tokens(case, kernel_device):
    logit, texts = make_logits(case, 33, dtype=torch.float32, device=kernel_device)
    made = []
    for form in IMPLEMENTATIONS:
        with use_implementation(form):
            made.append(decide(logit, torch.ones(1, device=kernel_device), **texts))
    scored = [float(x.scored_tokens) for x in made]
    assert scored == pytest.approx([scored[0]] * 3)
    if case == "documents":  # the two that are longer than 8 tokens
        assert scored[0] == pytest.approx((16 - MARGIN + 14 - MARGIN) / 2)
    if case == "short documents":  # none is longer, so all count
        assert scored[0] == pytest.approx((29 - MARGIN + 4 - MARGIN) / 2)
    assert not any(x.kept_share.requires_grad for x in made)
    assert made[0].kept_share.any()
    for other in made[1:]:
        assert_close("share", other.kept_share, made[0].kept_share, OUTPUT[torch.float32])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_scores_lie_on_a_grid_and_ties_go_to_the_even_step(form, kernel_device):
    logit = torch.tensor([0.5, 1.5, 2.5, -3.0, 0.25, 3.0e6, 2.0**24 + 2], device=kernel_device).view(1, 7, 1)
    with use_implementation(form):
        made = decide(logit, torch.ones(1, device=kernel_device), score="relu", steps_per_unit=1.0, margin=0)
        assert made.decided.flatten().tolist() == [0.0, 2.0, 2.0, 0.0, 0.0, 3.0e6, 2.0**24 + 2]
        fine = decide(torch.randn(1, 50, 2, device=kernel_device), torch.ones(1, device=kernel_device), margin=0)
    assert torch.equal(fine.decided * 16, (fine.decided * 16).round())
    assert fine.decided.unique().numel() > 5


def test_a_logit_that_is_no_number_shows(kernel_device):
    logit = torch.zeros(1, 9, 2, device=kernel_device)
    logit[0, 1, 1] = torch.nan
    for form in IMPLEMENTATIONS:
        with use_implementation(form):
            assert decide(logit, torch.ones(2, device=kernel_device)).budget_loss.isnan()


def test_a_gradient_of_one_output_alone(kernel_device):
    logit, texts = make_logits("padding", 33, dtype=torch.float32, device=kernel_device)
    logit.requires_grad_()
    gradients = {}
    for form in ("eager", "triton"):
        with use_implementation(form):
            made = decide(logit, torch.ones(3, device=kernel_device), **texts)
        gradients[form] = [
            torch.autograd.grad(x, logit, retain_graph=True)[0] for x in (made.decided.sum(), made.budget_loss)
        ]
    for name, actual, expected in zip(("decided", "loss"), *reversed(gradients.values()), strict=True):
        assert_close(name, actual, expected, GRADIENT[torch.float32])


def test_the_same_bounds_with_other_numbers_are_read_again(kernel_device):
    logit, _ = make_logits("documents", 20, dtype=torch.float32, device=kernel_device)
    bounds = packed(8, 12, device=kernel_device)
    with use_implementation("triton"):
        first = decide(logit, torch.ones(1, device=kernel_device), cu_seqlens=bounds).decided
        bounds.copy_(packed(15, 5, device=kernel_device))
        second = decide(logit, torch.ones(1, device=kernel_device), cu_seqlens=bounds).decided
    assert not first[:, 5:8].any()
    assert not second[:, 12:15].any()
    assert second[:, 5:8].any()


def test_what_does_not_fit_is_named():
    logit, l1_weight = torch.zeros(2, 5, 3), torch.ones(3)
    for changed, message in [
        ({"logit": logit[0]}, "logit has shape"),
        ({"l1_weight": torch.ones(2)}, "l1_weight has shape"),
        ({"score": "tanh"}, "score is 'tanh'"),
        ({"steps_per_unit": 100.0}, "a power of two"),
        ({"positions": torch.zeros(2, 4)}, "positions has shape"),
        ({"cu_seqlens": packed(5)}, "needs one row"),
        ({"logit": logit[:1], "cu_seqlens": packed(5), "positions": torch.zeros(1, 5)}, "without padding"),
        ({"logit": logit[:1], "cu_seqlens": packed()}, "bounds of a document"),
    ]:
        with pytest.raises(ValueError, match=message):
            decide(**{"logit": logit, "l1_weight": l1_weight, **changed})


@pytest.mark.gpu
@pytest.mark.parametrize("score", ["sigmoid", "relu"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_the_gpu(case, score):
    """Real sizes, against eager in fp64; the same bits again."""
    logit, texts = make_logits(case, 30000, 9, dtype=torch.float32, device="cuda")
    logit.requires_grad_()
    l1_weight = torch.rand(9, device="cuda")
    results = []
    for form in ("eager", "triton", "triton"):
        given = logit.double() if form == "eager" else logit
        with use_implementation(form):
            made = decide(given, l1_weight, score=score, **texts)
        direction = torch.randn(logit.shape, generator=torch.Generator().manual_seed(1)).to(logit)
        total = (made.decided * direction).sum() + 1e5 * made.budget_loss
        results.append([made.decided, made.budget_loss, made.kept_share, *torch.autograd.grad(total, logit)])
    exact, first, again = results
    # Of so many numbers some lie where fp32 and fp64 round to two neighbours of the grid.
    assert (first[0] - exact[0]).abs().max() <= 1 / 16
    assert ((first[0] - exact[0]).abs() > 1e-3).float().mean() < 1e-4
    for name, actual, expected in zip(("loss", "share"), first[1:3], exact[1:3], strict=True):
        assert_close(name, actual, expected, 4 * OUTPUT[torch.float32])
    assert_close("gradient", first[3], exact[3], GRADIENT[torch.float32])
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
