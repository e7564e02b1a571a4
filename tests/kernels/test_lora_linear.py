"""Linear layers with adapters: one product a projection, against the sum that the paper writes."""

from functools import partial

import pytest
import torch

from hybridize_kernels import LoraProjection, lora_linear
from hybridize_kernels.lora_linear import eager
from tests.kernels.tolerances import assert_form_agrees


def run(*tensors, kinds, with_residual=False, scale=0.7):
    """The op on flat tensors: x, (residual,) and for each kind what it has of weight, bias, down, up."""
    waiting = list(tensors)
    x = waiting.pop(0)
    residual = waiting.pop(0) if with_residual else None
    projections = []
    for kind in kinds:
        weight = waiting.pop(0)
        bias = waiting.pop(0) if "b" in kind else None
        down, up = (waiting.pop(0), waiting.pop(0)) if "a" in kind else (None, None)
        projections.append(LoraProjection(weight, bias, down, up, scale))
    return lora_linear(x, projections, residual=residual)


def make_inputs(kinds, *, tokens=(2, 7), width=12, outs=(20, 8, 8), rank=3, with_residual=False, dtype, device):
    shapes = [(*tokens, width)] + ([(*tokens, outs[0])] if with_residual else [])
    for kind, out in zip(kinds, outs, strict=False):
        shapes.append((out, width))
        shapes += [(out,)] if "b" in kind else []
        shapes += [(rank, width), (out, rank)] if "a" in kind else []
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kinds", [("",), ("b",), ("a",), ("ab", "a", ""), ("a", "ab", "b")], ids=str)
def test_outputs_and_gradients_equal_the_paper(dtype, kinds, device):
    assert_form_agrees(partial(run, kinds=kinds), make_inputs(kinds, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("width", "outs", "rank"), [(12, (20, 8), 3), (70, (65, 130), 16), (64, (3, 1), 70)], ids=str)
def test_the_kernel_equals_the_paper(dtype, width, outs, rank, kernel_device):
    kinds = ("ab", "a")
    inputs = make_inputs(kinds, width=width, outs=outs, rank=rank, dtype=dtype, device=kernel_device)
    # In half precision up down is rounded with W, here by the spacing of the larger sum.
    looser = 1.0 if dtype == torch.float32 else 4.0
    assert_form_agrees(partial(run, kinds=kinds), inputs, form="triton", looser=looser)


@pytest.mark.parametrize("kept", [0, 10**9], ids=["made again", "kept"])
def test_an_adapted_weight_may_be_kept(kept, device, monkeypatch):
    monkeypatch.setattr(eager, "KEPT_BELOW", kept)
    kinds = ("ab", "a", "")
    assert_form_agrees(partial(run, kinds=kinds), make_inputs(kinds, dtype=torch.float32, device=device))


@pytest.mark.parametrize("kind", ["", "ab"])
def test_a_residual_is_added(kind, device):
    inputs = make_inputs((kind,), with_residual=True, dtype=torch.float32, device=device)
    assert_form_agrees(partial(run, kinds=(kind,), with_residual=True), inputs)


@pytest.mark.parametrize("tokens", [(0,), (1,), (3, 1, 2)], ids=str)
def test_any_number_of_tokens(tokens, device):
    inputs = make_inputs(("ab", "a"), tokens=tokens, dtype=torch.float64, device=device)
    assert_form_agrees(partial(run, kinds=("ab", "a")), inputs)


def test_gradients_keep_the_dtype_of_what_they_are_of():
    x, weight, down, up = make_inputs(("a",), dtype=torch.float32, device="cpu")
    leaves = [x.bfloat16().requires_grad_(), down.requires_grad_(), up.requires_grad_()]
    (y,) = lora_linear(leaves[0], [LoraProjection(weight.bfloat16(), None, leaves[1], leaves[2], 0.5)])
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), leaves)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]


@pytest.mark.parametrize(("kinds", "kept"), [(("", ""), 0), (("a", "a"), 1)], ids=["frozen", "adapted"])
def test_the_input_is_kept_once_and_only_for_what_learns(kinds, kept):
    x, *rest = make_inputs(kinds, dtype=torch.float32, device="cpu")
    trained = [tensor.requires_grad_() if tensor.shape[0] == 3 or tensor.shape[-1] == 3 else tensor for tensor in rest]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        run(x.requires_grad_(), *trained, kinds=kinds)
    assert sum(tensor.numel() == x.numel() and tensor.data_ptr() == x.data_ptr() for tensor in saved) == kept


def test_autocast_decides_the_type_of_the_products():
    x, weight, down, up = make_inputs(("a",), dtype=torch.float32, device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = lora_linear(x, [LoraProjection(weight, None, down, up, 0.5)])
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": torch.ones(4, 5)}, "weight 0"),
        ({"bias": torch.ones(3)}, "bias 0"),
        ({"down": torch.ones(2, 6)}, "one half"),
        ({"down": torch.ones(2, 6), "up": torch.ones(4, 3)}, "up 0"),
    ],
)
def test_wrong_shapes_are_named(change, says):
    projection = LoraProjection(torch.ones(4, 6))._replace(**change)
    with pytest.raises(ValueError, match=f"lora_linear: .*{says}"):
        lora_linear(torch.ones(2, 6), [projection])


def test_a_residual_belongs_to_one_projection():
    with pytest.raises(ValueError, match="expected one"):
        lora_linear(torch.ones(2, 6), [LoraProjection(torch.ones(4, 6))] * 2, residual=torch.ones(2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("above", [0, 10**9], ids=["narrow products", "whole gradient"])
def test_on_a_gpu_in_both_forms_of_the_gradient(dtype, above, monkeypatch):
    monkeypatch.setattr(eager, "SKINNY_ABOVE", above)
    kinds, sizes = ("ab", "a"), {"tokens": (2, 512), "width": 192, "outs": (320, 64), "rank": 8}
    inputs = make_inputs(kinds, **sizes, dtype=dtype, device="cuda")
    # Factors that are rounded once more (W + up down).
    assert_form_agrees(partial(run, kinds=kinds), inputs, form="triton", looser=2.0)
