"""Inputs of the gate gradient, and a comparison that says which call and which key is wrong."""

import math

import torch
from torch import Tensor

from hybridize_kernels import gate_gradient, use_implementation
from tests.kernels.tolerances import GRADIENT, assert_close

GATES = [("value", False), ("logit", False), ("value", True), ("logit", True)]
"""What a gate is on, and whether hidden keys count."""


def make_inputs(time, heads=2, group=3, size=8, *, batch=2, dtype=torch.float32, device="cpu", shown=0.5):
    """q, k, v, do, log-sum-exp, delta and exits; log-sum-exps above the logits, as those of what is seen."""
    rows, keys = (batch, time, heads * group), (batch, time, heads)
    q, d_output = (torch.randn(*rows, size) for _ in range(2))
    k, v = (torch.randn(*keys, size) for _ in range(2))
    exits = torch.randint(0, time + 1, keys) * (torch.rand(keys) < shown)
    exact = [torch.randn(rows) + math.log(time + 1), torch.randn(rows), exits]
    return [x.to(device, dtype) for x in (q, k, v, d_output)] + [x.to(device) for x in exact]


def positions_of(time, *padding, device="cpu"):
    return torch.stack([(torch.arange(time) - missing).clamp(min=-1) for missing in padding]).to(device)


def run(form, inputs, **options):
    with use_implementation(form):
        return gate_gradient(*inputs, **options)


def assert_near(case: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """As `assert_close`; the message also tells where the largest difference is, and between which numbers."""
    if actual.shape == expected.shape and actual.numel() > 0:
        difference = (actual.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
        place = tuple(int(x) for x in torch.unravel_index(difference.argmax(), difference.shape))
        case += f", worst at {list(place)}: {actual[place].item():.6g}, expected {expected[place].item():.6g}"
    assert_close(case, actual, expected, tolerance)


def assert_agrees(form, inputs, *, looser=1.0, gates=GATES, standard="reference", **options):
    """Against another form in fp64: "eager" in place of the reference for texts whose matrices take gigabytes."""
    exact = [x.double() for x in inputs[:-1]] + inputs[-1:]
    q, k = inputs[:2]
    case = f"{form} of q {list(q.shape)}, k {list(k.shape)}, {q.dtype}, {q.device.type}, {described(options)}"
    for on, hidden in gates:
        for largest in (False, True) if hidden and on == "logit" else (False,):
            gate = {"on": on, "hidden": hidden, "largest": largest}
            result = run(form, inputs, **gate, **options)
            assert result.dtype == torch.float32
            expected = run(standard, exact, **gate, **options)
            # The inputs are taken as they are, whatever their dtype.
            assert_near(f"{described(gate)}, {case}", result, expected, looser * GRADIENT[torch.float32])


def described(options: dict[str, object]) -> str:
    return ", ".join(name if isinstance(value, Tensor) else f"{name} {value}" for name, value in options.items())
