"""The distillation loss's kernel, in the interpreter on tiny rows or compiled: against the reference in fp64."""

from functools import partial

import pytest
import torch

from hybridize_kernels import distillation_loss, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS
from hybridize_kernels.distillation_loss.tiles import VARIABLE, Tile, chunk_size, table
from tests.kernels.test_distillation_loss import DIRECTIONS, LargestTensor, make_inputs, op
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

SMALL_TILES = "full=128,4,2;top_k=128,4,2"
BACK_AND_FORTH = ["full=128,4,2,1", "full=128,1,1,0"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("vocabulary", "temperature"), [(1, 1.0), (7, 2.5), (128, 1.0), (300, 0.5), (1000, 1.0)])
@pytest.mark.parametrize("tiles", BACK_AND_FORTH)
def test_loss_and_gradients_equal_the_reference(direction, vocabulary, temperature, tiles, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, tiles)
    inputs = make_inputs(4, vocabulary=vocabulary, dtype=torch.float32, device=kernel_device)
    mask = torch.tensor([True, False, True, True], device=kernel_device)
    options = {"direction": direction, "temperature": temperature, "mask": mask, "chunk_tokens": 3}
    assert_form_agrees(partial(op, **options), inputs, form="triton")


def without_biases(student_hidden, student_head, teacher_hidden, teacher_head, **options):
    return distillation_loss(student_hidden, teacher_hidden, student_head, teacher_head, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_without_biases_or_a_mask(dtype, tokens, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    inputs = make_inputs(tokens, 8, 8, 150, dtype=dtype, device=kernel_device)
    # Logits are rounded to the dtype, so they are kept small enough for that to be the tolerance's.
    inputs = [0.3 * x for n, x in enumerate(inputs) if n not in (2, 5)]
    assert_form_agrees(partial(without_biases, direction="mixed"), inputs, form="triton")


def test_each_gradient_has_the_dtype_of_its_input_and_can_be_taken_again(kernel_device):
    hidden, head, bias, *teacher = make_inputs(5, dtype=torch.float32, device=kernel_device)
    leaves = [hidden.half().requires_grad_(), head.requires_grad_(), bias.requires_grad_()]
    with use_implementation("triton"):
        loss, _ = op(*leaves, *teacher)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves)
    assert [g.dtype for g in first] == [torch.float16, torch.float32, torch.float32]
    for n, (once, thrice) in enumerate(zip(first, again, strict=True)):
        assert_close(f"gradient {n}", thrice, 3 * once, GRADIENT[once.dtype])


def test_a_frozen_head_gets_no_gradient_and_without_any_there_is_no_second_pass(kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    inputs = make_inputs(4, dtype=torch.float32, device=kernel_device)
    with use_implementation("triton"):
        plain = op(*inputs)
        inputs[0].requires_grad_()
        with torch.no_grad():
            unasked = op(*inputs)
        loss, agreement = op(*inputs)
    loss.backward()
    assert inputs[0].grad.abs().max() > 0
    assert inputs[1].grad is None
    assert not unasked[0].requires_grad
    assert not agreement.requires_grad
    assert torch.equal(plain[0], loss)
    assert torch.equal(unasked[0], loss)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_logits_give_numbers(form, direction, kernel_device):
    """±1e4, on different tokens: probabilities are exactly 0 and 1, and divergences the logits' distance."""
    inputs = [torch.ones(2, 1, device=kernel_device), -1e4 * torch.ones(9, 1, device=kernel_device)]
    student, teacher = inputs[1].clone(), inputs[1].clone()
    student[4], teacher[7] = 1e4, 1e4
    hidden = inputs[0].requires_grad_()
    with use_implementation(form):
        loss, agreement = distillation_loss(hidden, inputs[0].detach(), student, teacher, direction=direction)
        (gradient,) = torch.autograd.grad(loss, hidden)
    assert_close("loss", loss, torch.full_like(loss, 2e4), OUTPUT[torch.float32])
    assert agreement == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("tiles", BACK_AND_FORTH)
def test_ties_go_to_the_lower_token(form, tiles, kernel_device, monkeypatch):
    """Within a block, over two of them, and against a token that comes first."""
    monkeypatch.setenv(VARIABLE, tiles)
    pairs = [([5, 9], [5]), ([5, 9], [9]), ([5, 290], [5]), ([5, 290], [290]), ([130, 290], [130]), ([0, 5], [0])]
    hidden = torch.eye(len(pairs), device=kernel_device)
    student, teacher = (torch.zeros(300, len(pairs), device=kernel_device) for _ in range(2))
    for n, (tied, first) in enumerate(pairs):
        student[tied, n], teacher[first, n] = 1.0, 1.0
    with use_implementation(form):
        _, agreement = distillation_loss(hidden, hidden, student, teacher)
    assert agreement == torch.tensor(4, device=kernel_device) / len(pairs)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_token_gives_zero_and_a_zero_gradient(direction, kernel_device):
    inputs = [x.requires_grad_() for x in make_inputs(4, dtype=torch.float32, device=kernel_device)]
    with use_implementation("triton"):
        mask = torch.zeros(4, dtype=torch.bool, device=kernel_device)
        loss, agreement = op(*inputs, mask=mask, direction=direction)
    loss.backward()
    assert (loss, agreement) == (0, 0)
    assert all((x.grad == 0).all() for x in inputs[:3])


def test_logits_never_exist_whole(kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    inputs = [x.requires_grad_() for x in make_inputs(16, vocabulary=48, dtype=torch.float32, device=kernel_device)]
    with LargestTensor() as seen, use_implementation("triton"):
        loss, _ = op(*inputs, direction="mixed", chunk_tokens=8)
        loss.backward()
    assert seen.numel == 8 * 48


def test_autocast_multiplies_in_its_dtype_and_sums_in_fp32(kernel_device):
    inputs = [x.requires_grad_() for x in make_inputs(4, dtype=torch.float32, device=kernel_device)]
    halves = [x.half() if n in (0, 1, 3, 4) else x for n, x in enumerate(inputs)]
    with use_implementation("triton"):
        expected, _ = op(*halves)
        with torch.autocast(torch.device(kernel_device).type, dtype=torch.float16):
            loss, _ = op(*inputs)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for n, (actual, wanted) in enumerate(
        zip(*(torch.autograd.grad(x, inputs[:3]) for x in (loss, expected)), strict=True)
    ):
        assert actual.dtype == torch.float32
        assert_close(f"gradient {n}", actual, wanted, GRADIENT[torch.float16])


def test_double_precision_has_no_kernel():
    with use_implementation("triton"), pytest.raises(ValueError, match="does not cover"):
        op(*make_inputs(2))


def test_chunks_are_as_large_as_the_table_says_and_even(monkeypatch):
    monkeypatch.setenv(VARIABLE, "frozen=192;full=64,2,3,0")
    assert table().full == Tile(64, 2, 3, back=0)
    assert chunk_size(8192, 4 * 49152, trained=False) == 1024
    assert chunk_size(8192, 4 * 49152, trained=True) == 2048
    assert chunk_size(2100, 4 * 49152, trained=False) == 768  # three of them, and none of 52
    assert chunk_size(8192, 4 * 151936, trained=False) == 1024  # enough tokens for the products, at more memory
    assert chunk_size(8192, 5 << 20, trained=False) == 128  # as many as the limit allows
    assert chunk_size(100, 2, trained=False) == 100
    assert chunk_size(0, 2, trained=False) == 1
    assert chunk_size(9, 1 << 40, trained=False) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [49152, 151936, 50257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kernels_on_the_gpu(vocabulary, dtype, trained, direction):
    """Real vocabularies: no further from fp64 than the eager form in the same dtype; the same bits again."""
    inputs = make_inputs(1000, 96, 128, vocabulary, dtype=dtype, device="cuda")
    inputs = [0.2 * x for x in inputs]
    mask = torch.arange(1000, device="cuda") % 5 != 2
    exact, rounded, first, again = (
        _on_the_gpu(form, [x.to(as_dtype) for x in inputs], trained, mask=mask, direction=direction)
        for form, as_dtype in [("eager", torch.float64), ("eager", dtype), ("triton", dtype), ("triton", dtype)]
    )
    for n, (truth, plain, found) in enumerate(zip(exact, rounded, first, strict=True)):
        assert found.dtype == plain.dtype
        size = float(truth.abs().max()) or 1.0
        error, allowed = (float((x.double() - truth).abs().max()) / size for x in (found, plain))
        least = (GRADIENT if n > 1 else OUTPUT)[dtype]
        assert error <= max(1.5 * allowed, least), f"tensor {n}: {error:.3g}, in plain PyTorch {allowed:.3g}"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _on_the_gpu(form, inputs, trained, **options):
    """Loss, agreement and gradients."""
    leaves = [x.requires_grad_() for x in (inputs[:3] if trained else inputs[:1])]
    with use_implementation(form):
        loss, agreement = op(*inputs, **options)
    return [loss.detach(), agreement, *torch.autograd.grad(loss, leaves)]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    inputs = make_inputs(300, 32, 32, 1000, dtype=torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in inputs[:3]]
    mask = torch.arange(300, device="cuda") % 5 != 2
    op(*inputs, mask=mask)[0].backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = op(*inputs, mask=mask, chunk_tokens=128)
        torch.autograd.grad(loss, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
