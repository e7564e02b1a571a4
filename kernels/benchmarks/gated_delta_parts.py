"""What surrounds the gated delta rule in a layer: the short convolution and the gated RMSNorm, fused or compiled.

Ours beside the eager form, torch.compile of the eager form, and FLA's modules where they are installed. Bytes are
those that a pass needs at least: the convolution reads x and writes y, backward it reads dy and x and writes dx; the
norm also reads the gate, and backward writes its gradient. FLA's norm has one scale for all heads and a sigmoid without
the factor of two, which costs the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, graph_ms, median_ms, relative_error
from hybridize_kernels import gated_rms_norm, short_convolution, short_convolution_step, use_implementation
from hybridize_kernels.gated_rms_norm.eager import gated_rms_norm as gated_rms_norm_in_torch
from hybridize_kernels.short_convolution.eager import short_convolution as short_convolution_in_torch

TAPS = 4
CHECKED_TOKENS = 2048
ROTATED_STATES = 32

Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    H: int
    D: int

    @property
    def numbers(self) -> int:
        return self.B * self.T * self.H * self.D


CASES = [Case(8, 4096, 16, 128), Case(8, 2048, 9, 64)]
STEPS = [Case(1, 1, 16, 128), Case(64, 1, 16, 128)]
"""Of one token; H is also the number of key heads."""
TINY = [Case(2, 40, 2, 16)]


@dataclass(frozen=True)
class Part:
    """An op as the mixer calls it; how many tensors the size of x each pass reads and writes at least."""

    name: str
    run: Op
    eager: Op
    inputs: Callable[[Case, str], list[Tensor]]
    forward_tensors: int
    backward_tensors: int
    peer: Callable[[], Op]


def on_gpu() -> bool:
    return torch.cuda.is_available()


def _draw(device: str) -> Callable[..., Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return lambda *shape: torch.randn(*shape, device=device).to(dtype)


def convolution_inputs(case: Case, device: str) -> list[Tensor]:
    """x, and taps in fp32 as in mixed precision."""
    return [_draw(device)(case.B, case.T, case.H, case.D), torch.randn(case.H * case.D, TAPS, device=device)]


def norm_inputs(case: Case, device: str) -> list[Tensor]:
    """x, scale in fp32, gate."""
    shape = (case.B, case.T, case.H, case.D)
    return [_draw(device)(*shape), torch.randn(case.H, case.D, device=device), _draw(device)(*shape)]


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    return short_convolution(x, taps)[0]


def convolve_eager(x: Tensor, taps: Tensor) -> Tensor:
    return short_convolution_in_torch(x, taps)[0]


def fla_convolution() -> Op:
    run = import_module("fla.modules.causal_conv1d").causal_conv1d
    return lambda x, taps: run(x.flatten(2), taps)[0].view_as(x)


def fla_norm() -> Op:
    run = import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated
    return lambda x, scale, gate: run(x, gate, scale[0], None, activation="sigmoid")


PARTS = [
    Part("short convolution", convolve, convolve_eager, convolution_inputs, 2, 3, fla_convolution),
    Part("gated norm", gated_rms_norm, gated_rms_norm_in_torch, norm_inputs, 3, 5, fla_norm),
]


def forms(part: Part) -> Iterator[tuple[str, Callable[[], Op]]]:
    """Each form's name, and what makes it: a peer may already raise when it is imported."""
    yield "ours", lambda: part.run
    yield "eager", lambda: part.eager
    backend = "inductor" if on_gpu() else "eager"
    yield "torch.compile", lambda: torch.compile(part.eager, backend=backend, dynamic=False)
    if on_gpu() and find_spec("fla"):
        yield "fla", part.peer


def _eager(run: Op, *arguments: Any) -> Tensor:
    with use_implementation("eager"):
        return run(*arguments)


def step_of(run: Op, leaves: list[Tensor], *, backward: bool) -> Callable[[], Any]:
    """A forward pass, or a forward and a backward pass."""
    if backward:
        direction = torch.randn_like(leaves[0])
        return lambda: torch.autograd.grad(run(*leaves), leaves, direction)

    @torch.no_grad()
    def forward() -> Tensor:
        return run(*leaves)

    return forward


def error_of(part: Part, run: Op, case: Case, device: str) -> float:
    """Largest relative error of the output and every gradient on a shorter text, beside the eager form in fp64."""
    short = replace(case, B=1, T=min(case.T, CHECKED_TOKENS))
    leaves = [x.requires_grad_() for x in part.inputs(short, device)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    direction = torch.randn_like(leaves[0])
    out, wanted = run(*leaves), part.eager(*exact)
    found = torch.autograd.grad(out, leaves, direction)
    targets = torch.autograd.grad(wanted, exact, direction.double())
    return max(relative_error(a, b) for a, b in zip((out, *found), (wanted, *targets), strict=True))


def compare(report: Report, yardsticks: Yardsticks, *, tiny: bool) -> None:
    """Every form of both ops forward and back, then their steps of one token."""
    torch.manual_seed(0)
    for part in PARTS:
        for case in TINY if tiny else CASES:
            measure(part, case, report, yardsticks)
    for case in [replace(TINY[0], T=1)] if tiny else STEPS:
        measure_steps(case, report, yardsticks)


def measure(part: Part, case: Case, report: Report, yardsticks: Yardsticks) -> None:
    device = "cuda" if on_gpu() else "cpu"
    letters = vars(case)
    leaves = [x.requires_grad_() for x in part.inputs(case, device)]
    for name, make in forms(part):
        label = f"{name}, {part.name}"
        error = run = None
        with report.guarded(label, "forward", letters):
            torch.compiler.reset()  # each case compiled for its own shapes
            run = make()
            if name != "fla":  # which has another scale
                error = error_of(part, run, case, device)
        if run is None:
            continue
        for pass_, tensors in (
            ("forward", part.forward_tensors),
            ("forward+backward", part.forward_tensors + part.backward_tensors),
        ):
            with report.guarded(label, pass_, letters):
                step = step_of(run, leaves, backward=pass_ != "forward")
                times = {"ms": median_ms(step), **replayed(step)}
                num_bytes = tensors * case.numbers * leaves[0].element_size()
                rates = yardsticks.of_copy(num_bytes, min(times.values()))
                report.add(label, pass_, letters, **times, **rates, rel_error=error)


def replayed(step: Callable[[], Any]) -> dict[str, float]:
    """The time of a CUDA graph's replay, where the step can be captured."""
    try:
        return {"graph_ms": graph_ms(step, 1)}
    except (RuntimeError, torch.AcceleratorError):
        return {}


def measure_steps(case: Case, report: Report, yardsticks: Yardsticks) -> None:
    """One token a row through the convolutions of q, k and v, and through the norm: replays over many states."""
    device = "cuda" if on_gpu() else "cpu"
    draw, letters, count = _draw(device), vars(case), ROTATED_STATES if on_gpu() else 2
    channels = case.H * case.D
    taps = tuple(torch.randn(channels, TAPS, device=device) for _ in range(3))
    texts = [tuple(draw(case.B, 1, case.H, case.D) for _ in range(3)) for _ in range(count)]
    tails = [draw(case.B, TAPS - 1, 3 * channels) for _ in range(count)]
    heads = [norm_inputs(case, device) for _ in range(count)]

    def convolutions(step: Callable[..., Any]) -> None:
        for xs, tail in zip(texts, tails, strict=True):
            step(xs, taps, tail)

    def norms(norm: Op) -> None:
        for inputs in heads:
            norm(*inputs)

    size = case.numbers * texts[0][0].element_size()
    for label, walk, op, num_bytes in (
        ("short convolution", convolutions, short_convolution_step, 3 * size * 2 * TAPS),
        ("gated norm", norms, gated_rms_norm, 3 * size),
    ):
        for name in ("ours", "eager"):
            with report.guarded(f"{name}, {label}", "decode", letters), torch.no_grad():
                run = op if name == "ours" else partial(_eager, op)
                ms = graph_ms(partial(walk, run), count)
                rates = yardsticks.of_copy(num_bytes, ms)
                report.add(f"{name}, {label}", "decode", letters, ms=ms, **rates, caches=count)
