"""Memory and time of a training step, forward and backward, which should grow with the text and no faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, median_ms
from benchmarks.retained_cases import TINY, Case, make_inputs, ours, visible_pairs
from hybridize_kernels import retained_attention, token_scorer

CASES = [Case(1, 1024 * length, 32, 8, 128, 512, 512) for length in (8, 16, 32, 64, 128)]
TAPS, DILATION, CONVOLUTIONS = 3, 2, 3


def run(report: Report, yardsticks: Yardsticks, *, tiny: bool) -> None:
    for case in [TINY] if tiny else CASES:
        capped = replace(case, capped=True)
        for name, of, prepare in (
            ("ours", case, attention),
            ("ours", capped, attention),
            ("ours, scorer and all", capped, scored),
        ):
            with report.guarded(name, "training step", of.letters()):
                measure(name, of, prepare, report, yardsticks)


Step = Callable[[], Any]


def attention(case: Case, inputs: list[Tensor]) -> Step:
    """The op alone, on scores that are given."""
    attend, direction = ours(inputs[3], case), torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(attend(*inputs[:3]), inputs, direction)


def scored(case: Case, inputs: list[Tensor]) -> Step:
    """A layer's attention: scores from a CNN over keys and values, and gradients of its weights too."""
    q, k, v, _ = inputs
    weights, biases, output_weight, output_bias = scorer = scorer_parameters(case, q.device)
    parameters = [*weights, *biases, output_weight, output_bias]
    real = torch.ones(case.B, case.T, dtype=torch.bool, device=q.device)
    direction = torch.randn_like(q)

    def step() -> Any:
        score = token_scorer(k, v, *scorer, real, dilation=DILATION, compute_dtype=k.dtype)
        out = retained_attention(q, k, v, score, window=case.W, budget=case.budget)
        return torch.autograd.grad(out, [q, k, v, *parameters], direction)

    return step


def scorer_parameters(case: Case, device: torch.device) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor]:
    """Random weights with a last bias of 0: about half of all tokens score above 0, so that the cap binds."""
    widths = [2 * case.D >> step for step in range(CONVOLUTIONS + 1)]

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) * shape[-2] ** -0.5).requires_grad_()

    weights = [draw(case.H, TAPS * first, second) for first, second in pairwise(widths)]
    biases = [torch.zeros(case.H, width, device=device, requires_grad=True) for width in widths[1:]]
    return weights, biases, draw(case.H, widths[-1], 1), torch.zeros(case.H, 1, device=device, requires_grad=True)


def measure(
    name: str,
    case: Case,
    prepare: Callable[[Case, list[Tensor]], Step],
    report: Report,
    yardsticks: Yardsticks,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(case, device, gradient=True)
    step = prepare(case, inputs)
    step()  # compiles
    numbers: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated()
        numbers = {"peak_gib": peak / 2**30, "step_bytes_per_token": (peak - held) / case.T}
    ms = median_ms(step)
    numbers["ns_per_token"] = 1e6 * ms / (case.B * case.T)
    if prepare is attention:
        numbers |= yardsticks.of_matmul(14 * case.D * visible_pairs(case, inputs[3], "retained"), ms)
    report.add(name, "training step", case.letters(), ms=ms, **numbers)
