"""Rotary position embedding: eager and Triton against the equation."""

from importlib import import_module

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybridize_kernels import rotary, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

kernel = import_module("hybridize_kernels.rotary.kernel")


def make_inputs(
    time, heads=(3, 1), size=12, rotated=None, *, batch=2, per_row=False, dtype=torch.float64, device="cpu"
):
    """q, k, and cosines and sines whose halves have nothing to do with each other."""
    drawn = [torch.randn(batch, time, count, size, dtype=torch.float64) for count in heads]
    shape = (batch if per_row else 1, time, rotated or size)
    drawn += [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    return [x.to(device, dtype) for x in drawn]


def angles(time, size, *, dtype=torch.float32, device="cpu"):
    """Cosines and sines `[1, T, size]` as transformers makes them."""
    frequencies = 10000.0 ** -(torch.arange(0, size, 2, device=device) / size)
    turned = torch.arange(time, device=device)[None, :, None] * frequencies
    turned = torch.cat((turned, turned), dim=-1)
    return turned.cos().to(dtype), turned.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("time", [0, 1, 5])
@pytest.mark.parametrize(("size", "rotated", "per_row"), [(12, None, False), (10, 6, True), (2, 2, True)])
def test_outputs_and_gradients_equal_the_equation(dtype, time, size, rotated, per_row, device):
    inputs = make_inputs(time, size=size, rotated=rotated, per_row=per_row, dtype=dtype, device=device)
    assert_form_agrees(rotary, inputs)


def test_gradients_of_eager_are_those_of_its_outputs():
    q, k, cos, sin = make_inputs(3, size=6, rotated=4)
    assert torch.autograd.gradcheck(rotary, (q.requires_grad_(), k.requires_grad_(), cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("time", "heads", "size", "rotated", "per_row", "tiles"),
    [
        (1, (1, 1), 64, None, False, None),
        (20, (9, 3), 60, None, False, None),
        (5, (3, 1), 80, 20, True, None),
        (3, (2, 5), 96, 2, False, None),
        (5, (3, 2), 16, None, False, "16,2,4"),
        (3, (3, 1), 7, 6, True, "4,4,4"),
    ],
)
def test_the_kernel_equals_the_equation(dtype, time, heads, size, rotated, per_row, tiles, kernel_device, monkeypatch):
    if tiles is not None:
        monkeypatch.setenv(kernel.VARIABLE, tiles)
    inputs = make_inputs(time, heads, size, rotated, per_row=per_row, dtype=dtype, device=kernel_device)
    assert_form_agrees(rotary, inputs, form="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eager_is_the_rotation_of_transformers_bit_for_bit(dtype):
    q, k = (x.to(dtype) for x in make_inputs(7, size=16)[:2])
    cos, sin = angles(7, 16, dtype=dtype)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    with use_implementation("eager"):
        found = rotary(q, k, cos, sin)
    assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_a_rotation_keeps_lengths_and_its_backward_pass_turns_back(form, kernel_device):
    q, k = make_inputs(6, size=16, dtype=torch.float32, device=kernel_device)[:2]
    q.requires_grad_()
    with use_implementation(form):
        turned, _ = rotary(q, k, *angles(6, 16, device=kernel_device))
    assert_close("length", turned.norm(dim=-1), q.norm(dim=-1), OUTPUT[torch.float32])
    assert_close("turned back", torch.autograd.grad(turned, q, turned)[0], q, GRADIENT[torch.float32])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_each_has_its_own_dtype_and_cosines_get_no_gradient(form, kernel_device):
    q, k, cos, sin = (x.requires_grad_() for x in make_inputs(4, dtype=torch.float32, device=kernel_device))
    leaves = [q.detach().half().requires_grad_(), k, cos, sin]
    with use_implementation(form):
        outputs = rotary(*leaves)
    assert [x.dtype for x in outputs] == [torch.float16, torch.float32]
    gradients = torch.autograd.grad(sum(x.float().sum() for x in outputs), leaves, allow_unused=True)
    assert [g if g is None else g.dtype for g in gradients] == [torch.float16, torch.float32, None, None]


def test_one_alone_may_have_a_gradient(kernel_device):
    inputs = make_inputs(5, (3, 2), rotated=8, dtype=torch.float32, device=kernel_device)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    with use_implementation("triton"):
        both = torch.autograd.grad(sum(x.square().sum() for x in rotary(*inputs)), leaves)
        for n, leaf in enumerate(leaves):
            from_one = torch.autograd.grad(rotary(*inputs)[n].square().sum(), leaves, allow_unused=True)
            assert torch.equal(from_one[n], both[n])
            assert from_one[1 - n] is None
            others = [x if x is leaf else x.detach() for x in inputs]
            alone = torch.autograd.grad(sum(x.square().sum() for x in rotary(*others)), leaf)
            assert torch.equal(alone[0], both[n])


@pytest.mark.parametrize(("batch", "time"), [(2, 3), (1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("heads", [(3, 2), (1, 1)])
def test_inputs_need_not_be_contiguous(batch, time, heads, kernel_device):
    q, k, cos, sin = make_inputs(time, heads, batch=batch, dtype=torch.float32, device=kernel_device)
    projected = torch.cat((k, q, k), dim=2).flatten(2)
    sizes = [count * 12 for count in (heads[1], *heads)]
    _, sliced_q, sliced_k = (x.unflatten(-1, (-1, 12)) for x in projected.split(sizes, dim=-1))
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    late = [torch.cat((x, x), dim=1)[:, time:] for x in (q, k)]
    apart = [torch.cat((x, x), dim=-1)[..., :12] for x in (q, k)]
    turned_over = [x.mT.contiguous().mT for x in (q, k)]
    over_rows = [x.expand(batch, -1, -1) for x in (cos, sin)]
    tables = [over_rows, [over_rows[0], over_rows[1].contiguous()], [x.mT.contiguous().mT for x in over_rows]]
    expected = None
    for n, inputs in enumerate(([q, k], [sliced_q, sliced_k], by_head, late, apart, turned_over)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with use_implementation("triton"):
            outputs = rotary(*leaves, *(tables[n % 3] if n else (cos, sin)))
        gradients = torch.autograd.grad(outputs, leaves, [x.detach() for x in inputs])
        assert all(x.is_contiguous() for x in (*outputs, *gradients))
        expected = expected or (*outputs, *gradients)
        assert all(torch.equal(a, b) for a, b in zip((*outputs, *gradients), expected, strict=True))


def test_slices_of_a_projection_are_read_where_they_lie_and_heads_outside_of_time_are_not():
    projected = torch.randn(2, 5, 6, 4)
    found, token, head = kernel._layout(projected[:, :, 2:4])
    assert found.data_ptr() == projected[:, :, 2:].data_ptr()
    assert (token, head) == (24, 4)
    for batch in (1, 2):
        found, token, head = kernel._layout(torch.randn(batch, 3, 5, 4).transpose(1, 2))
        assert found.is_contiguous()
        assert (token, head) == (12, 4)


def test_a_compiled_call_is_the_same(kernel_device):
    def around(q, k, cos, sin):
        return sum(x.square().mean() for x in rotary(q * 2, k, cos, sin))

    inputs = make_inputs(4, dtype=torch.float32, device=kernel_device)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    torch.compiler.reset()
    with use_implementation("triton"):
        compiled = torch.autograd.grad(torch.compile(around, backend="eager")(*inputs), leaves)
        plain = torch.autograd.grad(around(*inputs), leaves)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda q, k, cos, sin: (q[0], k, cos, sin)),
        ("k", lambda q, k, cos, sin: (q, k[:, 1:], cos, sin)),
        ("k", lambda q, k, cos, sin: (q, k[..., :6], cos, sin)),
        ("cos", lambda q, k, cos, sin: (q, k, cos[0], sin[0])),
        ("cos", lambda q, k, cos, sin: (q, k, cos[..., :5], sin[..., :5])),
        ("cos", lambda q, k, cos, sin: (q[..., :6], k[..., :6], cos, sin)),
        ("cos", lambda q, k, cos, sin: (q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1))),
        ("cos", lambda q, k, cos, sin: (q, k, cos[:, 1:], sin[:, 1:])),
        ("sin", lambda q, k, cos, sin: (q, k, cos, sin[..., :6])),
    ],
)
def test_misshapen_inputs_are_named(name, change):
    with pytest.raises(ValueError, match=f"rotary: {name} has shape"):
        rotary(*change(*make_inputs(3)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(
    ("time", "heads", "size", "rotated"),
    [(2048, (9, 3), 64, None), (1024, (32, 8), 128, None), (999, (16, 2), 80, 20), (1, (14, 2), 60, None)],
)
def test_the_kernel_on_the_gpu(dtype, per_row, time, heads, size, rotated):
    """Real sizes, in slices of one projection, against eager in fp64."""
    q, k, cos, sin = make_inputs(
        time, heads, size, rotated, batch=3, per_row=per_row, dtype=torch.float64, device="cuda"
    )
    projected = torch.cat((q, k, k), dim=2).to(dtype).requires_grad_()
    directions = [torch.randn_like(x) for x in (q, k)]
    cos, sin = cos.to(dtype), sin.to(dtype)
    results = []
    for form in ("eager", "triton"):
        source = projected.double() if form == "eager" else projected
        with use_implementation(form):
            outputs = rotary(source[:, :, : heads[0]], source[:, :, heads[0] : sum(heads)], cos, sin)
        total = sum((x * direction).sum() for x, direction in zip(outputs, directions, strict=True))
        results.append([*outputs, torch.autograd.grad(total, projected)[0]])
    for n, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert_close(f"tensor {n}", actual, expected, (GRADIENT if n > 1 else OUTPUT)[dtype])
