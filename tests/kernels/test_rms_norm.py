"""RMSNorm with and without the residual stream: eager and Triton against the equation."""

from functools import partial
from importlib import import_module

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hybridize_kernels import rms_norm, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

kernel = import_module("hybridize_kernels.rms_norm.kernel")
SMALL_TILES = "forward=256,4,2;backward=256,4,3;trained=256,4,3"


def make_inputs(*shape, residual=True, dtype=torch.float64, device="cpu"):
    drawn = torch.randn(2, *shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    x, other, weight = (tensor.to(device, dtype) for tensor in (*drawn[0], drawn[1]))
    return [x, weight, other][: 2 + residual]


def norm(x, weight, residual=None, *, epsilon=1e-6, **options):
    return rms_norm(x, weight, epsilon=epsilon, residual=residual, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("shape", "epsilon"),
    [((2, 0, 6), 1e-6), ((7,), 1e-6), ((2, 5, 3, 60), 1e-6), ((3, 1), 0.1)],  # a lone number's norm is nearly its sign
)
@pytest.mark.parametrize("residual", [True, False])
def test_outputs_and_gradients_equal_the_equation(dtype, shape, epsilon, residual, device):
    inputs = make_inputs(*shape, residual=residual, dtype=dtype, device=device)
    assert_form_agrees(partial(norm, epsilon=epsilon), inputs)


@pytest.mark.parametrize("residual", [True, False])
def test_gradients_of_eager_are_those_of_its_outputs(residual):
    inputs = [x.requires_grad_() for x in make_inputs(3, 5, residual=residual)]
    assert torch.autograd.gradcheck(norm, inputs)


@pytest.mark.parametrize(("dtype", "residual"), [(torch.float32, True), (torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize(
    ("shape", "epsilon"),
    [((1, 60), 1e-6), ((2, 3, 1), 0.1), ((2, 5, 64), 1e-5), ((17, 80), 1e-6), ((33, 12), 1.0), ((5, 576), 1e-6)],
)
def test_the_kernels_equal_the_equation(dtype, residual, shape, epsilon, kernel_device, monkeypatch):
    monkeypatch.setenv(kernel.VARIABLE, SMALL_TILES)
    inputs = make_inputs(*shape, residual=residual, dtype=dtype, device=kernel_device)
    assert_form_agrees(partial(norm, epsilon=epsilon), inputs, form="triton")


@pytest.mark.parametrize("size", [1536, 4096, 16384])
def test_the_kernels_take_wide_rows(size, kernel_device):
    assert_form_agrees(norm, make_inputs(3, size, dtype=torch.float32, device=kernel_device), form="triton")


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.float16, 80), (torch.bfloat16, 80)])
def test_eager_is_the_norm_of_transformers_bit_for_bit(dtype, size):
    x, weight, residual = make_inputs(2, 9, size, dtype=dtype)
    theirs = LlamaRMSNorm(size, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(weight)
    with use_implementation("eager"):
        assert torch.equal(norm(x, weight, epsilon=1e-5), theirs(x))
        y, s = norm(x, weight, residual, epsilon=1e-5)
    assert torch.equal(s, residual + x)
    assert torch.equal(y, theirs(residual + x))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_dtypes_are_those_of_the_inputs_and_of_the_sum(form, kernel_device):
    x, weight, residual = (a.float().requires_grad_() for a in make_inputs(5, 12, device=kernel_device))
    with use_implementation(form):
        alone = norm(x.half(), weight)
        y, s = norm(half := x.detach().half().requires_grad_(), weight, residual)
    assert alone.dtype == torch.float16
    assert y.dtype == s.dtype == torch.float32
    gradients = torch.autograd.grad((y * s).sum(), (half, weight, residual))
    assert [g.dtype for g in gradients] == [torch.float16, torch.float32, torch.float32]
    assert torch.equal(gradients[0], gradients[2].half())


def test_only_what_is_asked_for_has_a_gradient(kernel_device):
    x, weight, residual = make_inputs(6, 20, dtype=torch.float32, device=kernel_device)
    leaves = [a.requires_grad_() for a in (x, weight, residual)]
    with use_implementation("triton"):
        y, s = norm(*leaves)
        both = torch.autograd.grad(y.square().sum() + s.sum(), leaves)
        y, s = norm(x, weight.detach(), residual)
        frozen = torch.autograd.grad(y.square().sum() + s.sum(), (x, residual))
        assert torch.equal(frozen[0], both[0])
        assert torch.equal(frozen[1], both[2])
        of_sum = torch.autograd.grad(norm(*leaves)[1].sum(), leaves, allow_unused=True)
    assert torch.equal(of_sum[0], torch.ones_like(x))
    assert torch.equal(of_sum[2], torch.ones_like(x))
    assert of_sum[1] is None


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_without_a_residual_the_sum_is_x_and_its_gradient_is_added(form, kernel_device):
    inputs = make_inputs(6, 20, residual=False, dtype=torch.float32, device=kernel_device)
    assert_form_agrees(partial(norm, return_sum=True), inputs, form=form)
    x, weight = (a.requires_grad_() for a in inputs)
    with use_implementation(form):
        y, s = norm(x, weight, return_sum=True)
        assert torch.equal(y, norm(x, weight))
    assert torch.equal(s, x)
    assert torch.equal(torch.autograd.grad(s.sum(), x)[0], torch.ones_like(x))


def test_a_row_of_zeros_stays_one_and_has_a_finite_gradient(kernel_device):
    x, weight = make_inputs(3, 16, residual=False, dtype=torch.float32, device=kernel_device)
    x[1] = 0
    x.requires_grad_()
    with use_implementation("triton"):
        y = norm(x, weight)
    assert not y[1].any()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_inputs_need_not_be_contiguous(kernel_device):
    leaves = make_inputs(2, 6, 20, dtype=torch.float32, device=kernel_device)
    x, weight, residual = leaves
    sliced = torch.cat((x, x), dim=-1)[..., :20]
    transposed = residual.transpose(0, 1).contiguous().transpose(0, 1)
    with use_implementation("triton"):
        expected = norm(*leaves)
        found = norm(sliced, torch.stack((weight, weight), dim=1)[:, 0], transposed)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, expected, strict=True))
    directions = [torch.randn(2, 20, 6, device=kernel_device).transpose(1, 2) for _ in range(2)]
    for form in ("triton", "reference"):
        with use_implementation(form):
            inputs = [a.clone().requires_grad_() for a in leaves]
            gradients = torch.autograd.grad(norm(*inputs), inputs, directions)
        found = gradients if form == "triton" else found
    for n, (actual, wanted) in enumerate(zip(found, gradients, strict=True)):
        assert_close(f"gradient {n}", actual, wanted, GRADIENT[torch.float32])


def test_a_slice_is_read_where_it_lies(kernel_device):
    wide = torch.randn(2, 6, 40, device=kernel_device)
    assert kernel._rows(wide[..., 20:]).data_ptr() == wide[..., 20:].data_ptr()


def test_work_covers_every_row_with_no_more_programs_than_asked_for():
    for name, table in kernel.TABLES.items():
        for rows in (1, 3, 1000, 32768):
            for size in (1, 60, 576, 2048, 4096, 8192, 16384):
                work = kernel.work_of(name, rows, size, None)
                tile = table[min(most for most in table if most >= work.block)]
                assert work.programs <= tile.programs
                assert work.rows * work.steps * (work.programs - 1) < rows <= work.rows * work.steps * work.programs


def test_a_compiled_call_is_the_same(kernel_device):
    def around(x, weight, residual):
        y, s = norm(x * 2, weight, residual)
        return (y + s).square().mean()

    leaves = [a.requires_grad_() for a in make_inputs(4, 16, dtype=torch.float32, device=kernel_device)]
    torch.compiler.reset()
    with use_implementation("triton"):
        compiled = torch.autograd.grad(torch.compile(around, backend="eager")(*leaves), leaves)
        plain = torch.autograd.grad(around(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_misshapen_inputs_are_named():
    x, weight, residual = make_inputs(3, 4)
    for arguments, message in [
        ((x[0, 0], weight), "x has no dimension"),
        ((x, weight[1:]), "weight has shape"),
        ((x, weight, residual[1:]), "residual has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            norm(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("rows", "size"), [(32768, 576), (4099, 2048), (2048, 4096), (1000, 8192), (300, 16384), (1, 60)]
)
def test_kernels_on_the_gpu(dtype, residual, rows, size):
    """Real sizes, against eager in fp64; the same bits again, and the same without the weight's gradient."""
    leaves = [a.requires_grad_() for a in make_inputs(rows, size, residual=residual, dtype=dtype, device="cuda")]
    directions = [torch.randn(rows, size, device="cuda", dtype=torch.float64) for _ in range(1 + residual)]
    results = []
    for form in ("eager", "triton", "triton"):
        with use_implementation(form):
            outputs = norm(*[a.double() for a in leaves] if form == "eager" else leaves)
        outputs = outputs if residual else (outputs,)
        total = sum((y * direction).sum() for y, direction in zip(outputs, directions, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, leaves)])
    exact, first, again = results
    for n, (actual, expected) in enumerate(zip(first, exact, strict=True)):
        assert_close(f"tensor {n}", actual, expected, (GRADIENT if n > residual else OUTPUT)[dtype])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    outputs = norm(leaves[0], leaves[1].detach(), *leaves[2:])
    outputs = outputs if residual else (outputs,)
    total = sum((y * direction).sum() for y, direction in zip(outputs, directions, strict=True))
    assert_close("dx, frozen", torch.autograd.grad(total, leaves[0])[0], exact[1 + residual], GRADIENT[dtype])
