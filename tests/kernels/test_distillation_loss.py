"""The distillation loss: against whole logits, against torch's own KL, and never holding the logits whole."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hybridize_kernels import distillation_loss, use_implementation
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

FORMS = ["reference", "eager"]
DIRECTIONS = ["forward", "reverse", "mixed"]


def make_inputs(tokens, width=6, teacher_width=8, vocabulary=23, *, dtype=torch.float64, device="cpu"):
    """student_hidden, student_head, student_bias; teacher_hidden, teacher_head, teacher_bias."""
    shapes = [(tokens, width), (vocabulary, width), (vocabulary,), (tokens, teacher_width), (vocabulary, teacher_width)]
    shapes.append((vocabulary,))
    return [torch.randn(*shape, dtype=torch.float64).to(dtype).to(device) for shape in shapes]


def op(student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias, **options):
    return distillation_loss(
        student_hidden,
        teacher_hidden,
        student_head,
        teacher_head,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        **options,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_equal_the_reference(direction, temperature, tokens, dtype, device):
    inputs = make_inputs(tokens, dtype=dtype, device=device)
    mask = (torch.arange(tokens) % 3 != 1).to(device)
    options = {"direction": direction, "temperature": temperature, "mask": mask, "chunk_tokens": 5}
    assert_form_agrees(partial(op, **options), inputs)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 20), st.integers(1, 25), st.sampled_from(DIRECTIONS), st.integers(0, 999))
def test_chunks_change_nothing(tokens, chunk_tokens, direction, seed):
    torch.manual_seed(seed)
    inputs = [x.requires_grad_() for x in make_inputs(tokens)]
    results = []
    for size in (chunk_tokens, 1024):
        loss, agreement = op(*inputs, direction=direction, chunk_tokens=size)
        results.append((loss, agreement, *torch.autograd.grad(2.5 * loss, inputs[:3])))
    for n, (chunked, whole) in enumerate(zip(*results, strict=True)):
        assert_close(f"result {n}", chunked, whole, GRADIENT[torch.float64])


@pytest.mark.parametrize("form", FORMS)
def test_forward_is_the_divergence_of_torch(form):
    hidden, head, bias, teacher_hidden, teacher_head, teacher_bias = inputs = make_inputs(9)
    student, teacher = hidden @ head.T + bias, teacher_hidden @ teacher_head.T + teacher_bias
    log_q, log_p = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    kl = partial(torch.nn.functional.kl_div, log_target=True, reduction="batchmean")
    with use_implementation(form):
        loss, agreement = op(*inputs, temperature=2.0)
        assert_close("forward", loss, 4 * kl(log_q, log_p), OUTPUT[torch.float64])
        assert_close("reverse", op(*inputs, temperature=2.0, direction="reverse")[0], 4 * kl(log_p, log_q), 1e-12)
    assert agreement == (student.argmax(-1) == teacher.argmax(-1)).double().mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_models_agree_without_loss(form, direction):
    hidden, head, bias, *_ = make_inputs(9)
    hidden.requires_grad_()
    with use_implementation(form):
        loss, agreement = op(hidden, head, bias, hidden.detach(), head, bias, direction=direction)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(loss) <= 1e-15
    assert agreement == 1
    assert gradient.abs().max() <= 1e-15


@pytest.mark.parametrize("form", FORMS)
def test_only_masked_tokens_count(form):
    inputs = make_inputs(12)
    mask = torch.tensor([True, False, True] * 4)
    kept = [x[mask] if n in (0, 3) else x for n, x in enumerate(inputs)]
    batched = [x.unflatten(0, (3, 4)) if n in (0, 3) else x for n, x in enumerate(inputs)]
    with use_implementation(form):
        expected = op(*kept)
        for results in (op(*inputs, mask=mask), op(*batched, mask=mask.unflatten(0, (3, 4)))):
            assert_close("loss", results[0], expected[0], OUTPUT[torch.float64])
            assert_close("agreement", results[1], expected[1], OUTPUT[torch.float64])


@pytest.mark.parametrize("form", FORMS)
def test_no_token_gives_zero_and_a_zero_gradient(form):
    inputs = [x.requires_grad_() for x in make_inputs(4)]
    with use_implementation(form):
        loss, agreement = op(*inputs, mask=torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert agreement == 0
    assert all((x.grad == 0).all() for x in inputs[:3])


@pytest.mark.parametrize("form", FORMS)
def test_gradient_reaches_the_student_only(form):
    inputs = make_inputs(6)
    for x in (inputs[0], *inputs[3:]):
        x.requires_grad_()
    with use_implementation(form):
        loss, agreement = op(*inputs)
    loss.backward()
    assert inputs[0].grad.abs().max() > 0
    assert [x.grad for x in inputs[1:]] == [None] * 5
    assert not agreement.requires_grad


def test_bfloat16_models_give_an_fp32_loss(device):
    inputs = make_inputs(40, 32, 32, dtype=torch.bfloat16, device=device)
    inputs = [x * 0.3 for x in inputs]
    loss, _ = op(*inputs)
    assert loss.dtype == torch.float32
    assert_form_agrees(lambda *x: op(*x, chunk_tokens=16)[0], inputs)


def test_autocast_leaves_the_sums_alone():
    inputs = [x.bfloat16() for x in make_inputs(20)]
    expected, _ = op(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = op(*inputs)
    assert torch.equal(loss, expected)


class LargestTensor(TorchDispatchMode):
    """Records the most numbers any operation gave back; bytes, which an interpreted kernel is handed, are none."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_never_exist_whole(direction):
    inputs = [x.requires_grad_() for x in make_inputs(64, vocabulary=50)]
    with LargestTensor() as seen:
        loss, _ = op(*inputs, direction=direction, chunk_tokens=8)
        loss.backward()
    assert seen.numel == 8 * 50


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_equals_finite_differences(form, direction):
    hidden, head, bias, *teacher = make_inputs(5, 3, 4, 6)
    leaves = [x.requires_grad_() for x in (hidden, head, bias)]
    with use_implementation(form):
        assert torch.autograd.gradcheck(
            lambda *x: op(*x, *teacher, direction=direction, temperature=1.5, chunk_tokens=2)[0], leaves
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "backward"}, "unknown direction 'backward'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, "mask has shape"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        op(*make_inputs(4), **options)


def test_misshapen_tensors_are_named():
    hidden, head, bias, teacher_hidden, teacher_head, teacher_bias = make_inputs(4)
    with pytest.raises(ValueError, match="differ in their tokens"):
        op(hidden[:3], head, bias, teacher_hidden, teacher_head, teacher_bias)
    with pytest.raises(ValueError, match="teacher_head has shape"):
        op(hidden, head, bias, teacher_hidden, teacher_head[:20], teacher_bias)
    with pytest.raises(ValueError, match="student_bias has shape"):
        op(hidden, head, bias[:3], teacher_hidden, teacher_head, teacher_bias)
