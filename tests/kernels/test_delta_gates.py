"""The gates of the gated delta rule: eager and Triton against their equations."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from hybridize_kernels import delta_gates, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

VARIABLE = "HYBRIDIZE_DELTA_GATES"
SMALL_TILES = "forward=16,16,4,1,1;backward=16,16,4,1,6"
"""Several blocks of columns, several tiles a program and several programs along the longer texts."""

PADDING = {
    "none": lambda t, row: None,
    "left": lambda t, row: t >= 3 * row + 1,
    "between": lambda t, row: t % 4 != 2,
}


def make_inputs(time, heads=3, width=10, *, batch=2, dtype=torch.float64, device="cpu"):
    """Hidden states, then the parameters; gates neither shut nor open."""
    shapes = [(batch, time, width), (heads, width), (heads,), (heads,), (heads, width), (heads,)]
    scales = [1.0, width**-0.5, 1.0, 0.7, width**-0.5, 1.0]
    made = [scale * torch.randn(shape, dtype=torch.float64) for shape, scale in zip(shapes, scales, strict=True)]
    return [x.to(device, dtype) for x in made]


def make_real(pattern, time, batch=2, device="cpu"):
    rows = [PADDING[pattern](torch.arange(time, device=device), row) for row in range(batch)]
    return None if rows[0] is None else torch.stack(rows)


@pytest.mark.parametrize("pattern", PADDING)
@pytest.mark.parametrize("ceiling", [1.0, 2.0])
@pytest.mark.parametrize("time", [0, 1, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_equal_the_equations(pattern, ceiling, time, dtype, device):
    inputs = make_inputs(time, dtype=dtype, device=device)
    real = make_real(pattern, time, device=device)
    assert_form_agrees(partial(delta_gates, beta_ceiling=ceiling, real=real), inputs)


@pytest.mark.parametrize("pattern", PADDING)
@pytest.mark.parametrize(
    ("time", "heads", "width", "ceiling"), [(1, 1, 5, 1.0), (20, 3, 40, 2.0), (37, 9, 16, 1.0), (18, 18, 33, 2.0)]
)
def test_the_kernels_equal_the_equations(pattern, time, heads, width, ceiling, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    inputs = make_inputs(time, heads, width, dtype=torch.float32, device=kernel_device)
    real = make_real(pattern, time, device=kernel_device)
    assert_form_agrees(partial(delta_gates, beta_ceiling=ceiling, real=real), inputs, form="triton")


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_what_padding_holds_is_not_read(form, kernel_device):
    hidden, *parameters = make_inputs(9, dtype=torch.float32, device=kernel_device)
    real = make_real("between", 9, device=kernel_device)
    hidden[~real] = torch.nan
    hidden.requires_grad_()
    with use_implementation(form):
        gates = delta_gates(hidden, *parameters, real=real)
    assert all(gate[real].isfinite().all() and not gate[~real].any() for gate in gates)
    gradient = torch.autograd.grad(sum(gate.sum() for gate in gates), hidden)[0]
    assert gradient[real].isfinite().all()


def test_of_the_kernels_what_is_frozen_gets_no_gradient(kernel_device):
    leaves = [x.requires_grad_() for x in make_inputs(7, dtype=torch.float32, device=kernel_device)]
    with use_implementation("triton"):
        everything = torch.autograd.grad(sum(x.square().sum() for x in delta_gates(*leaves)), leaves)
        for kept in (slice(0, 1), slice(1, 6)):
            others = [x if n in range(6)[kept] else x.detach() for n, x in enumerate(leaves)]
            some = torch.autograd.grad(sum(x.square().sum() for x in delta_gates(*others)), leaves[kept])
            # Another kernel is compiled for what is left to do: its sums may be rounded otherwise.
            for actual, expected in zip(some, everything[kept], strict=True):
                assert_close("gradient", actual, expected, GRADIENT[torch.float32])


def test_each_gradient_has_the_dtype_of_its_input(kernel_device):
    hidden, *parameters = (x.requires_grad_() for x in make_inputs(5, dtype=torch.float32, device=kernel_device))
    hidden = hidden.detach().half().requires_grad_()
    leaves = [hidden, *parameters]
    for form in ("eager", "triton"):
        with use_implementation(form), torch.autocast(kernel_device, torch.float16):
            gates = delta_gates(*leaves)
        assert [gate.dtype for gate in gates] == [torch.float32] * 2
        gradients = torch.autograd.grad(sum(gate.sum() for gate in gates), leaves)
        assert [g.dtype for g in gradients] == [torch.float16] + [torch.float32] * 5


def test_products_are_rounded_as_a_linear_layer_rounds_them(kernel_device):
    """So that a prompt and a step after it, which runs the layers, meet the same gates."""
    hidden, *parameters = make_inputs(40, dtype=torch.float16, device=kernel_device)
    with use_implementation("triton"):
        log_decay, beta = delta_gates(hidden, *parameters)
    decay_weight, decay_bias, rate, beta_weight, beta_bias = parameters
    decay = F.softplus(F.linear(hidden, decay_weight).float() + decay_bias.float())
    assert_close("log a", log_decay, -rate.float().exp() * decay, 1e-3)
    expected = torch.sigmoid(F.linear(hidden, beta_weight, beta_bias).float())
    assert_close("b", beta, expected, 1e-3)
    assert ((beta - expected).abs() < 1e-6).float().mean() > 0.9  # of few a sum rounds to the neighbour


def test_misshapen_inputs_are_named():
    inputs = make_inputs(4)
    with pytest.raises(ValueError, match="hidden has shape"):
        delta_gates(inputs[0][0], *inputs[1:])
    for number, name in ((1, "decay_weight"), (2, "decay_bias"), (4, "beta_weight"), (5, "beta_bias")):
        changed = [x[1:] if n == number else x for n, x in enumerate(inputs)]
        with pytest.raises(ValueError, match=f"{name} has shape"):
            delta_gates(*changed)
    with pytest.raises(ValueError, match="real has shape"):
        delta_gates(*inputs, real=torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [(9, 576), (32, 4096), (14, 896)])
def test_kernels_on_the_gpu(dtype, heads, width):
    """Real sizes with wide parameters under autocast, against fp64; the same bits again."""
    hidden, *parameters = make_inputs(1500, heads, width, batch=3, dtype=torch.float32, device="cuda")
    leaves = [x.requires_grad_() for x in (hidden.to(dtype), *parameters)]
    real = make_real("left", 1500, 3, device="cuda")
    directions = [torch.randn(3, 1500, heads, device="cuda") for _ in range(2)]
    results = []
    for form in ("eager", "triton", "triton"):
        exact = form == "eager"
        given = [x.double() for x in leaves] if exact else leaves
        with use_implementation(form), torch.autocast("cuda", dtype, enabled=not exact and dtype != torch.float32):
            gates = delta_gates(*given, beta_ceiling=2.0, real=real)
        total = sum((gate * direction).sum() for gate, direction in zip(gates, directions, strict=True))
        results.append([*gates, *torch.autograd.grad(total, leaves)])
    exact, first, again = results
    for n, (actual, expected) in enumerate(zip(first, exact, strict=True)):
        assert_close(f"tensor {n}", actual, expected, (OUTPUT if n < 2 else GRADIENT)[dtype])
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
