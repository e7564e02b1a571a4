"""The distillation loss of cached teachers: all forms against each other, and against the full divergence."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridize_kernels import distillation_loss, top_k_distillation_loss, top_k_targets, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS
from hybridize_kernels.distillation_loss.tiles import VARIABLE
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

SMALL_TILES = "full=128,4,2;top_k=128,4,2"


def make_inputs(tokens, vocabulary=23, k=4, *, width=6, dtype=torch.float64, device="cpu", teacher_width=8):
    """student_hidden, student_head, student_bias; top_ids, top_log_probs; the teacher's hidden states and head."""
    shapes = [(tokens, width), (vocabulary, width), (vocabulary,), (tokens, teacher_width), (vocabulary, teacher_width)]
    hidden, head, bias, teacher_hidden, teacher_head = (
        torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes
    )
    targets = top_k_targets(teacher_hidden, teacher_head, k)
    return [hidden, head, bias], targets, (teacher_hidden, teacher_head)


def op(hidden, head, bias, *, targets, **options):
    return top_k_distillation_loss(hidden, head, *targets, student_bias=bias, **options)


@pytest.mark.parametrize("tokens", [0, 1, 20])
@pytest.mark.parametrize("k", [1, 4, 22, 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_equal_the_reference(tokens, k, dtype, device):
    leaves, targets, _ = make_inputs(tokens, k=k, dtype=dtype, device=device)
    mask = (torch.arange(tokens) % 3 != 1).to(device)
    assert_form_agrees(partial(op, targets=targets, mask=mask, chunk_tokens=7), leaves)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "k"),
    [(0, 7, 2), (1, 1, 1), (5, 7, 1), (5, 7, 7), (4, 128, 5), (3, 300, 40), (2, 1000, 3)],
)
@pytest.mark.parametrize("masked", [True, False])
def test_the_kernel_equals_the_reference(tokens, vocabulary, k, masked, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    leaves, targets, _ = make_inputs(tokens, vocabulary, k, dtype=torch.float32, device=kernel_device)
    mask = (torch.arange(tokens) % 3 != 1).to(kernel_device) if masked else None
    assert_form_agrees(partial(op, targets=targets, mask=mask, chunk_tokens=3), leaves, form="triton")


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_the_whole_vocabulary_is_the_full_divergence(form, kernel_device):
    leaves, targets, (teacher_hidden, teacher_head) = make_inputs(6, k=23, dtype=torch.float32, device=kernel_device)
    hidden, head, bias = leaves = [x.requires_grad_() for x in leaves]
    with use_implementation("reference"):
        full = distillation_loss(hidden, teacher_hidden, head, teacher_head, student_bias=bias)
    with use_implementation(form):
        top = op(*leaves, targets=targets)
    assert_close("loss", top[0], full[0], OUTPUT[torch.float32])
    assert torch.equal(top[1], full[1])
    found, wanted = (torch.autograd.grad(loss, leaves) for loss in (top[0], full[0]))
    for n, (actual, expected) in enumerate(zip(found, wanted, strict=True)):
        assert_close(f"gradient {n}", actual, expected, GRADIENT[torch.float32])


@given(st.integers(0, 9), st.integers(1, 30), st.data(), st.floats(0.01, 30), st.integers(0, 999))
def test_property_between_zero_and_the_full_divergence(tokens, vocabulary, data, size, seed):
    """Divergences are not negative, and merging outcomes never adds to one (the data-processing inequality)."""
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, vocabulary))
    (hidden, head, bias), _, teacher = make_inputs(tokens, vocabulary, k)
    teacher_ids, teacher_log_probs = top_k_targets(size * teacher[0], teacher[1], k)
    for form in ("reference", "eager"):
        with use_implementation(form):
            full, _ = distillation_loss(hidden, size * teacher[0], head, teacher[1], student_bias=bias)
            top, _ = top_k_distillation_loss(hidden, head, teacher_ids, teacher_log_probs, student_bias=bias)
        error = 1e-6 * (1 + float(full))  # log-probabilities are kept in fp32
        assert -error <= top <= full + error


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_a_tail_of_almost_nothing_keeps_its_logarithm(form, size, kernel_device):
    """Student logits of ±size: q_t underflows in fp32, and the loss is still the logits' distance."""
    dtype = torch.float64 if form == "reference" else torch.float32  # whose log_softmax is rounded at this size
    logits = torch.full((1, 12), -size, device=kernel_device, dtype=dtype)
    logits[0, 3] = size
    head = logits.T.contiguous().requires_grad_()
    targets = torch.tensor([[3]], device=kernel_device), torch.tensor([[0.5]], device=kernel_device).log()
    with use_implementation(form):
        loss, agreement = top_k_distillation_loss(head.new_ones(1, 1), head, *targets)
        (gradient,) = torch.autograd.grad(loss, head)
    assert_close("loss", loss, torch.full_like(loss, size), 0.05)
    assert agreement == 1
    wanted = torch.full_like(gradient, -0.5 / 11)
    wanted[3] = 0.5
    assert_close("gradient", gradient, wanted, GRADIENT[torch.float32])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_rounded_probabilities_are_a_distribution(form, kernel_device):
    """Log-probabilities in bf16 that sum to more than 1, an impossible token among them."""
    leaves, (ids, log_probs), _ = make_inputs(5, k=6, dtype=torch.float32, device=kernel_device)
    log_probs = (log_probs - log_probs.logsumexp(-1, keepdim=True) + 0.004).bfloat16()
    log_probs[:, -1] = float("-inf")
    options = {"targets": (ids, log_probs)}
    assert_form_agrees(partial(op, **options), leaves, form=form)
    with use_implementation(form):
        assert op(*leaves, **options)[0] > 0


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_agreement_breaks_ties_to_the_lower_id(form, kernel_device):
    """9 and 200 are equal, and both kept or only one of them."""
    logits = torch.zeros(4, 300, device=kernel_device)
    logits[:, 200], logits[:, 9] = 2.0, 2.0
    ids = torch.tensor([[9, 200], [200, 9], [9, 1], [200, 1]], dtype=torch.int32, device=kernel_device)
    log_probs = torch.full((4, 2), -1.0, device=kernel_device)
    for n, wanted in enumerate([1, 0, 1, 0]):
        with use_implementation(form):
            _, agreement = top_k_distillation_loss(
                torch.ones(1, 1, device=kernel_device), logits[n, :, None], ids[n : n + 1], log_probs[n : n + 1]
            )
        assert agreement == wanted


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_no_token_gives_zero_and_a_zero_gradient(form, kernel_device):
    leaves, targets, _ = make_inputs(4, dtype=torch.float32, device=kernel_device)
    leaves = [x.requires_grad_() for x in leaves]
    mask = torch.zeros(4, dtype=torch.bool, device=kernel_device)
    with use_implementation(form):
        loss, agreement = op(*leaves, targets=targets, mask=mask)
    loss.backward()
    assert (loss, agreement) == (0, 0)
    assert all((x.grad == 0).all() for x in leaves)


def test_gradient_equals_finite_differences():
    leaves, targets, _ = make_inputs(5, 6, 3)
    leaves = [x.requires_grad_() for x in leaves]
    for form in ("reference", "eager"):
        with use_implementation(form):
            assert torch.autograd.gradcheck(lambda *x: op(*x, targets=targets, chunk_tokens=2)[0], leaves)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 3])
@pytest.mark.parametrize("k", [1, 5, 23])
def test_targets_are_the_most_probable_tokens_in_order(chunk_tokens, k):
    hidden, head, bias = torch.randn(2, 4, 6), torch.randn(23, 6), torch.randn(23)
    head[20] = head[2]
    bias[20] = bias[2] = 30.0  # equal and first, at the lower id
    ids, log_probs = top_k_targets(hidden.requires_grad_(), head, k, bias=bias, chunk_tokens=chunk_tokens)
    assert (ids.dtype, log_probs.dtype, log_probs.requires_grad) == (torch.int32, torch.float32, False)
    wanted = (hidden @ head.T + bias).log_softmax(-1)
    assert_close("log-probabilities", log_probs, wanted.sort(-1, descending=True)[0][..., :k], OUTPUT[torch.float32])
    assert_close("of these ids", wanted.gather(-1, ids.long()), log_probs, OUTPUT[torch.float32])
    assert k == 1 or (ids[..., :2] == torch.tensor([2, 20])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_ids": torch.zeros(4, 24, dtype=torch.int32), "top_log_probs": torch.zeros(4, 24)}, "k = 24"),
        ({"top_ids": torch.zeros(3, 4, dtype=torch.int32)}, "top_ids has shape"),
        ({"top_log_probs": torch.zeros(4, 3)}, "top_log_probs has shape"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, "mask has shape"),
        ({"student_bias": torch.zeros(5)}, "student_bias has shape"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    (hidden, head, _), (ids, log_probs), _ = make_inputs(4)
    arguments = {"student_hidden": hidden, "student_head": head, "top_ids": ids, "top_log_probs": log_probs}
    with pytest.raises(ValueError, match=message):
        top_k_distillation_loss(**arguments | change)
    with pytest.raises(ValueError, match="k is 24"):
        top_k_targets(hidden, head, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [49152, 50257, 151936])
@pytest.mark.parametrize("k", [1, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_on_the_gpu(vocabulary, k, dtype):
    """Real vocabularies: no further from fp64 than the eager form in the same dtype; the same bits again."""
    leaves, targets, _ = make_inputs(500, vocabulary, k, width=96, dtype=dtype, device="cuda", teacher_width=64)
    mask = torch.arange(500, device="cuda") % 5 != 2
    results = []
    for form, as_dtype in [("eager", torch.float64), ("eager", dtype), ("triton", dtype), ("triton", dtype)]:
        inputs = [(0.3 * x).to(as_dtype).requires_grad_() for x in leaves]
        with use_implementation(form):
            loss, agreement = op(*inputs, targets=targets, mask=mask)
        results.append([loss.detach(), agreement, *torch.autograd.grad(loss, inputs)])
    exact, rounded, first, again = results
    for n, (truth, plain, found) in enumerate(zip(exact, rounded, first, strict=True)):
        assert found.dtype == plain.dtype
        size = float(truth.abs().max()) or 1.0
        error, allowed = (float((x.double() - truth).abs().max()) / size for x in (found, plain))
        least = (GRADIENT if n > 1 else OUTPUT)[dtype]
        assert error <= max(1.5 * allowed, least), f"tensor {n}: {error:.3g}, in plain PyTorch {allowed:.3g}"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
