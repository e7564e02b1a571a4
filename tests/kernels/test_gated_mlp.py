"""The second half of a decoder layer as one op, against its equations."""

from functools import partial

import pytest
import torch

from hybridize_kernels import LoraProjection, gated_mlp, use_implementation
from hybridize_kernels.lora_linear import eager
from tests.kernels.tolerances import assert_form_agrees


def run(x, residual, norm_weight, *parts, adapters=True, bias=False, epsilon=1e-5):
    waiting = list(parts)
    projections = []
    for number in range(3):
        weight = waiting.pop(0)
        offset = waiting.pop(0) if bias and number < 2 else None
        down, up = (waiting.pop(0), waiting.pop(0)) if adapters else (None, None)
        projections.append(LoraProjection(weight, offset, down, up, 0.5))
    return gated_mlp(x, residual, norm_weight, *projections, epsilon=epsilon)


def make_inputs(tokens=(2, 9), width=12, inner=20, rank=3, *, adapters=True, bias=False, dtype, device):
    shapes = [(*tokens, width), (*tokens, width), (width,)]
    for number, (out, size) in enumerate(((inner, width), (inner, width), (width, inner))):
        shapes.append((out, size))
        shapes += [(out,)] if bias and number < 2 else []
        shapes += [(rank, size), (out, rank)] if adapters else []
    generator = torch.Generator().manual_seed(0)
    return [0.5 * torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("form", ["eager", "triton"])
@pytest.mark.parametrize(("adapters", "bias"), [(True, False), (False, False), (True, True)])
def test_outputs_and_gradients_equal_the_equations(form, adapters, bias, kernel_device):
    inputs = make_inputs(adapters=adapters, bias=bias, dtype=torch.float32, device=kernel_device)
    assert_form_agrees(partial(run, adapters=adapters, bias=bias), inputs, form=form)


def test_eager_in_double_precision(device):
    assert_form_agrees(run, make_inputs(dtype=torch.float64, device=device))


@pytest.mark.parametrize("kept", [0, 10**9], ids=["made again", "kept"])
def test_adapted_weights_may_be_kept(kept, kernel_device, monkeypatch):
    monkeypatch.setattr(eager, "KEPT_BELOW", kept)
    assert_form_agrees(run, make_inputs(dtype=torch.float32, device=kernel_device), form="triton")


@pytest.mark.parametrize("form", ["eager", "triton"])
def test_without_gradient_the_same_numbers(form, kernel_device):
    inputs = make_inputs(dtype=torch.float32, device=kernel_device)
    with use_implementation(form):
        recorded = run(*(x.requires_grad_() for x in inputs))
        with torch.no_grad():
            assert torch.equal(run(*inputs), recorded)


def test_frozen_layers_keep_the_sum_and_two_products(kernel_device):
    x, residual, *frozen = make_inputs(adapters=False, dtype=torch.float32, device=kernel_device)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with use_implementation("triton"), hooks:
        run(x.requires_grad_(), residual, *frozen, adapters=False)
    tokens = x.numel() // x.shape[-1]
    of_tokens = [t for t in saved if t.shape[:1] == (tokens,) or t.shape[:-1] == x.shape[:-1]]
    assert sum(t.numel() for t in of_tokens) == tokens * (12 + 2 * 20 + 1)


@pytest.mark.parametrize(
    ("name", "change"),
    [("residual", {"residual": torch.ones(3, 6)}), ("norm_weight", {"norm_weight": torch.ones(5)})],
)
def test_wrong_shapes_are_named(name, change):
    projection = LoraProjection(torch.ones(4, 6))
    arguments = {"x": torch.ones(2, 6), "residual": torch.ones(2, 6), "norm_weight": torch.ones(6)} | change
    with pytest.raises(ValueError, match=f"gated_mlp: {name}"):
        gated_mlp(**arguments, gate=projection, up=projection, down=LoraProjection(torch.ones(6, 4)), epsilon=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "inner"), [(576, 1536), (4096, 14336)])
def test_on_a_gpu_at_the_sizes_of_models(dtype, width, inner):
    inputs = make_inputs((3, 100), width, inner, 16, dtype=dtype, device="cuda")
    inputs = [x / (x.shape[-1] ** 0.5 if x.ndim == 2 else 1) for x in inputs]
    # The norm, both products, the activation and its gradients are rounded one after the other.
    assert_form_agrees(run, inputs, form="triton", looser=3.0)
