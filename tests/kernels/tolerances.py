"""How far a form of an op may lie from the fp64 reference: the one table, and the comparison that reads it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridize_kernels import use_implementation

# Largest difference over the largest value of the expected tensor.
OUTPUT = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}

Op = Callable[..., Tensor | tuple[Tensor | None, ...]]


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fails on a wrong shape, on NaN, and on a difference above tolerance · max |expected|."""
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if actual.numel() == 0:
        return
    size = expected.double().abs().max().item() or 1.0
    error = (actual.double() - expected.double()).abs().max().item() / size
    assert error <= tolerance, f"{name}: error {error:.3g} above {tolerance:.3g}"


def outputs_and_gradients(form: str, op: Op, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Run `op` in a form; gradients of a fixed random projection of its outputs, zeros where an input has none."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with use_implementation(form):
        result = op(*leaves)
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
    generator = torch.Generator().manual_seed(3)
    total = 0 * leaves[0].double().sum()  # an output without tokens may hang on no input
    for x in outputs:
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        total = total + (x.double() * direction).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    return [x.detach() for x in outputs], filled


def assert_form_agrees(op: Op, inputs: Sequence[Tensor], *, form: str = "eager", looser: float = 1.0) -> None:
    """Outputs and every gradient of a form against the reference on the same numbers in fp64."""
    dtype = inputs[0].dtype
    outputs, gradients = outputs_and_gradients(form, op, inputs)
    expected_outputs, expected_gradients = outputs_and_gradients("reference", op, [x.double() for x in inputs])
    assert len(outputs) == len(expected_outputs)
    for n, (actual, expected) in enumerate(zip(outputs, expected_outputs, strict=True)):
        assert_close(f"output {n}", actual, expected, looser * OUTPUT[dtype])
    for n, (actual, expected) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert_close(f"gradient {n}", actual, expected, looser * GRADIENT[dtype])
