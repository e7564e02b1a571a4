"""SwiGLU of one projection or of two: eager and Triton against the equation."""

from importlib import import_module

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from hybridize_kernels import swiglu, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

kernel = import_module("hybridize_kernels.swiglu.kernel")


def make_inputs(*shape, packed=False, dtype=torch.float64, device="cpu"):
    """The last of the shape is the size of the output."""
    if packed:
        return [(2 * torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)).to(device, dtype)]
    return [(2 * torch.randn(*shape, dtype=torch.float64)).to(device, dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(2, 0, 6), (1, 1), (7,), (2, 5, 3, 60)])
@pytest.mark.parametrize("packed", [True, False])
def test_outputs_and_gradients_equal_the_equation(dtype, shape, packed, device):
    assert_form_agrees(swiglu, make_inputs(*shape, packed=packed, dtype=dtype, device=device))


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_of_eager_are_those_of_its_outputs(packed):
    assert torch.autograd.gradcheck(swiglu, [x.requires_grad_() for x in make_inputs(3, 5, packed=packed)])


@pytest.mark.parametrize(("dtype", "packed"), [(torch.float32, True), (torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((2, 3, 1), None),
        ((17, 80), None),
        ((3, 576), None),
        ((2, 1536), None),
        ((1, 4096), None),
        ((1, 60), "forward=256,64,4;backward=128,32,4"),
        ((2, 5, 64), "forward=256,64,4;backward=128,32,4"),
        ((5, 80), "forward=64,32,4;backward=64,64,4"),
    ],
)
def test_the_kernels_equal_the_equation(dtype, packed, shape, tiles, kernel_device, monkeypatch):
    if tiles is not None:
        monkeypatch.setenv(kernel.VARIABLE, tiles)
    assert_form_agrees(swiglu, make_inputs(*shape, packed=packed, dtype=dtype, device=kernel_device), form="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_is_the_gate_of_transformers_bit_for_bit(dtype):
    block = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=20, num_attention_heads=2)).to(dtype)
    x = torch.randn(2, 5, 8, dtype=dtype)
    with use_implementation("eager"):
        assert torch.equal(block.down_proj(swiglu(block.gate_proj(x), block.up_proj(x))), block(x))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_each_gradient_has_the_dtype_of_its_input(form, kernel_device):
    gate, up = make_inputs(4, 10, dtype=torch.float32, device=kernel_device)
    leaves = [gate.half().requires_grad_(), up.requires_grad_()]
    with use_implementation(form):
        y = swiglu(*leaves)
    assert y.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(y.sum(), leaves)] == [torch.float16, torch.float32]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # in Triton's interpreter, and meant to
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_a_gate_far_from_zero_is_open_or_shut(form, kernel_device):
    gate = torch.tensor([-3e4, -200.0, 200.0, 3e4], device=kernel_device, requires_grad=True)
    up = torch.full((4,), 2.0, device=kernel_device, requires_grad=True)
    with use_implementation(form):
        y = swiglu(gate, up)
    assert y.tolist() == [0, 0, 400, 6e4]
    of_gate, of_up = torch.autograd.grad(y.sum(), (gate, up))
    assert of_gate.tolist() == [0, 0, 2, 2]
    assert of_up.tolist() == [0, 0, 200, 3e4]


def test_halves_of_one_tensor_and_slices_of_a_wider_one_are_the_same(kernel_device):
    (packed,) = make_inputs(2, 6, 20, packed=True, dtype=torch.float32, device=kernel_device)
    wide = torch.cat((packed, packed), dim=-1)
    gate, up = packed[..., :20].contiguous(), packed.mT.contiguous().mT[..., 20:]
    direction = torch.randn(2, 20, 6, device=kernel_device).transpose(1, 2)
    results = []
    for inputs in ([packed], [wide[..., 40:]], [gate, up], [wide[..., :20], wide[..., 60:]]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with use_implementation("triton"):
            y = swiglu(*leaves)
        gradients = torch.autograd.grad(y, leaves, direction)
        assert all(x.is_contiguous() for x in (y, *gradients))
        results.append((y, torch.cat(gradients, dim=-1)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_slice_is_read_where_it_lies(kernel_device):
    wide = torch.randn(2, 6, 40, device=kernel_device)
    gate, up = kernel._halves(wide[..., 8:], None)
    assert (gate.data_ptr(), up.data_ptr()) == (wide[..., 8:].data_ptr(), wide[..., 24:].data_ptr())


def test_columns_of_a_tile_leave_no_rest_in_a_real_model():
    for size in (1536, 4864, 8192, 8960, 9728, 11008, 14336, 18944):
        work = kernel.work_of("forward", 32768, size, None)
        assert size % work.columns == 0
        assert work.rows * work.columns == kernel.TILES["forward"].numbers
        assert work.tiles * work.rows * work.columns == 32768 * size


def test_a_compiled_call_is_the_same(kernel_device):
    def around(gate, up):
        return (swiglu(gate * 2, up) + 1).square().mean()

    leaves = [x.requires_grad_() for x in make_inputs(4, 16, dtype=torch.float32, device=kernel_device)]
    torch.compiler.reset()
    with use_implementation("triton"):
        compiled = torch.autograd.grad(torch.compile(around, backend="eager")(*leaves), leaves)
        plain = torch.autograd.grad(around(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_misshapen_inputs_are_named():
    gate, up = make_inputs(3, 5)
    for arguments, message in [
        ((gate,), r"gate has shape \[3, 5\], expected two halves"),
        ((gate, up[1:]), "up has shape"),
        ((gate[0, 0], up[0, 0]), "gate has no dimensions"),
    ]:
        with pytest.raises(ValueError, match=message):
            swiglu(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("rows", "size"), [(4096, 1536), (2048, 14336), (3001, 4864), (77, 60), (1, 4096)])
def test_kernels_on_the_gpu(dtype, packed, rows, size):
    """Real sizes, against eager in fp64."""
    leaves = [x.requires_grad_() for x in make_inputs(rows, size, packed=packed, dtype=dtype, device="cuda")]
    direction = torch.randn(rows, size, device="cuda", dtype=torch.float64)
    results = []
    for form in ("eager", "triton"):
        with use_implementation(form):
            y = swiglu(*[x.double() for x in leaves] if form == "eager" else leaves)
        results.append([y, *torch.autograd.grad((y * direction).sum(), leaves)])
    for n, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert_close(f"tensor {n}", actual, expected, (GRADIENT if n else OUTPUT)[dtype])
