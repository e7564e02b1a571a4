"""The scorer's weights as its kernels read them: rounded, and with each tap's sides exchanged, all in one launch."""

import importlib
from itertools import pairwise

import pytest
import torch

from hybridize_kernels import use_implementation
from tests.kernels.test_token_scorer import make_inputs, make_parameters, score
from tests.kernels.tolerances import GRADIENT, assert_close, assert_form_agrees, outputs_and_gradients

factors = importlib.import_module("hybridize_kernels.token_scorer.factors")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter cuts off where a GPU rounds
    ],
)
@pytest.mark.parametrize("widths", [[8, 6], [130, 65, 20, 3], [40, 33, 16, 8, 4, 3]], ids=str)
@pytest.mark.parametrize("turned", [True, False])
def test_they_are_the_weights_and_their_transposes(dtype, widths, turned, kernel_device):
    matrices = 6  # two scorers, three taps
    shapes = tuple(factors.Shape(matrices, a, b) for a, b in pairwise(widths))
    weights = [torch.randn(2, 3 * s.inputs, s.outputs, device=kernel_device) for s in shapes]
    prepared = factors.prepare(shapes, weights, dtype, turned=turned)
    parts = factors.parts_of(shapes, prepared)
    assert len(parts.turned) == (len(weights) if turned else 0)
    for n, (shape, weight) in enumerate(zip(shapes, weights, strict=True)):
        plain = parts.plain[n][: weight.numel()].view(weight.shape)
        assert torch.equal(plain, weight.to(dtype))
        assert parts.plain[n].data_ptr() % 16 == 0
        if turned:
            exchanged = parts.turned[n][: weight.numel()].view(matrices, shape.outputs, shape.inputs)
            assert torch.equal(exchanged, weight.to(dtype).view(matrices, shape.inputs, shape.outputs).transpose(1, 2))


def test_more_layers_than_a_launch_takes(kernel_device):
    inputs = make_inputs(9, 16, batch=1, dtype=torch.float32, device=kernel_device)
    inputs += make_parameters(16, 5, 1, dtype=torch.float32, device=kernel_device)
    assert_form_agrees(score, inputs, form="triton")


def test_parameters_of_a_shorter_type_have_their_gradients_in_it(kernel_device):
    k, v = make_inputs(12, dtype=torch.float32, device=kernel_device)
    parameters = make_parameters(4, dtype=torch.float16, device=kernel_device)
    # Equal numbers in fp32 give the same scores; gradients are rounded at their end.
    wide = outputs_and_gradients("triton", score, [k, v, *(x.float() for x in parameters)])
    short = outputs_and_gradients("triton", score, [k, v, *parameters])
    assert torch.equal(short[0][0], wide[0][0])
    for actual, expected in zip(short[1][2:], wide[1][2:], strict=True):
        assert actual.dtype == torch.float16
        assert_close("gradient", actual, expected, GRADIENT[torch.float16])
    with use_implementation("triton"), torch.no_grad():
        assert torch.equal(score(k, v, *parameters), short[0][0])
