"""The gated RMSNorm: eager and Triton against its equation."""

from functools import partial

import pytest
import torch

from hybridize_kernels import gated_rms_norm, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS
from hybridize_kernels.gated_rms_norm.kernel import VARIABLE
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

SMALL_TILES = "forward=256,4,1;backward=256,4,2"


def make_inputs(time, heads=3, size=12, *, batch=2, gate=True, dtype=torch.float64, device="cpu"):
    shapes = [(batch, time, heads, size), (heads, size), (batch, time, heads, size)]
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes[: 2 + gate]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("time", [0, 1, 15])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("epsilon", [1e-6, None])
def test_outputs_and_gradients_equal_the_equation(dtype, time, gate, epsilon, device):
    inputs = make_inputs(time, gate=gate, dtype=dtype, device=device)
    assert_form_agrees(partial(gated_rms_norm, epsilon=epsilon), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("time", "heads", "size"), [(1, 2, 60), (2, 3, 96), (15, 1, 256), (33, 3, 5)])
@pytest.mark.parametrize(("gate", "epsilon"), [(True, 1e-6), (True, None), (False, 0.1), (False, None)])
def test_the_kernels_equal_the_equation(dtype, time, heads, size, gate, epsilon, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    inputs = make_inputs(time, heads, size, gate=gate, dtype=dtype, device=kernel_device)
    assert_form_agrees(partial(gated_rms_norm, epsilon=epsilon), inputs, form="triton")


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_each_gradient_has_the_dtype_of_its_input(form, kernel_device):
    x, scale, gate = make_inputs(5, dtype=torch.float32, device=kernel_device)
    leaves = [x.half().requires_grad_(), scale.requires_grad_(), gate.half().requires_grad_()]
    with use_implementation(form):
        y = gated_rms_norm(*leaves)
    assert y.dtype == torch.float16
    gradients = torch.autograd.grad(y.float().sum(), leaves)
    assert [g.dtype for g in gradients] == [torch.float16, torch.float32, torch.float16]


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_a_start_is_the_norm_alone(form, kernel_device):
    """Scale 1 and gate 0; a head of zeros stays one, and its gradient is finite."""
    x, scale, gate = make_inputs(4, dtype=torch.float32, device=kernel_device)
    x[0, 0] = 0
    x.requires_grad_()
    with use_implementation(form):
        y = gated_rms_norm(x, torch.ones_like(scale), torch.zeros_like(gate))
    assert_close("output", y, torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6), OUTPUT[torch.float32])
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_inputs_need_not_be_contiguous(kernel_device):
    x, scale, gate = make_inputs(6, dtype=torch.float32, device=kernel_device)
    apart = [torch.cat((a, a), dim=-1)[..., : a.shape[-1]] for a in (x, scale, gate)]
    with use_implementation("triton"):
        assert torch.equal(gated_rms_norm(*apart), gated_rms_norm(x, scale, gate))


def test_misshapen_inputs_are_named():
    x, scale, gate = make_inputs(3)
    for arguments, message in [
        ((x[0], scale, gate), "x has shape"),
        ((x, scale[0], gate), "scale has shape"),
        ((x, scale, gate[:, 1:]), "gate has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_rms_norm(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [60, 64, 96, 128, 256])
def test_kernels_on_the_gpu(dtype, size):
    """Real sizes with a wide scale, against eager in fp64; the same bits again."""
    x, scale, gate = make_inputs(1000, 9, size, batch=3, dtype=dtype, device="cuda")
    leaves = [a.requires_grad_() for a in (x, scale.float(), gate)]
    direction = torch.randn(x.shape, device="cuda", dtype=torch.float64)
    results = []
    for form in ("eager", "triton", "triton"):
        inputs = [a.double() for a in leaves] if form == "eager" else leaves
        with use_implementation(form):
            y = gated_rms_norm(*inputs)
        results.append([y, *torch.autograd.grad((y * direction).sum(), leaves)])
    exact, first, again = results
    for n, (actual, expected) in enumerate(zip(first, exact, strict=True)):
        assert_close(f"tensor {n}", actual, expected, (GRADIENT if n else OUTPUT)[dtype])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
