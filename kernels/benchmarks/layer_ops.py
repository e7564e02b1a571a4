"""What a decoder layer does beside its matrix products and its attention: norms, the gate and rotary positions.

Ours beside eager, which is what transformers runs, and beside Liger's kernels where they are installed. Bytes are those
that a pass needs at least: every tensor read or written once. A backward pass stands with the forward pass before it.
Liger writes gradients over its inputs, so that its kernels see other numbers from the second call on; the error
is that of the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, graph_ms, median_ms, relative_error
from hybridize_kernels import rms_norm, rotary, swiglu, use_implementation

EPSILON = 1e-5
ROPE_BASE = 10000.0
CHECKED_ROWS = 2048

Op = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An op on some sizes.

    letters: the sizes; trained: how many of the inputs, from the first on, get a gradient; forward_numbers and
    backward_numbers: how many numbers a pass reads and writes at least.
    """

    op: str
    letters: dict[str, Any]
    inputs: Callable[[str], list[Tensor]]
    trained: int
    forward_numbers: int
    backward_numbers: int


def on_gpu() -> bool:
    return torch.cuda.is_available()


def _draw(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32)


def norm_case(rows: int, size: int, *, residual: bool, trained: bool) -> Case:
    """x, residual if there is one, weight."""

    def inputs(device: str) -> list[Tensor]:
        return [*(_draw(device, rows, size) for _ in range(1 + residual)), _draw(device, size)]

    letters = {"N": rows, "D": size, "weight": "trained" if trained else "frozen"}
    forward, backward = (4, 4) if residual else (2, 3)
    name = "add and rms norm" if residual else "rms norm"
    return Case(name, letters, inputs, 1 + residual + trained, forward * rows * size, backward * rows * size)


def gate_case(rows: int, size: int, *, projections: int) -> Case:
    """gate and up, of two projections or halves of one."""

    def inputs(device: str) -> list[Tensor]:
        return [_draw(device, rows, 2 * size // projections) for _ in range(projections)]

    letters = {"N": rows, "I": size, "projections": projections}
    return Case("swiglu", letters, inputs, projections, 3 * rows * size, 5 * rows * size)


def rotary_case(batch: int, time: int, query_heads: int, key_heads: int, size: int) -> Case:
    """q, k, cos, sin."""

    def inputs(device: str) -> list[Tensor]:
        frequencies = ROPE_BASE ** -(torch.arange(0, size, 2, device=device) / size)
        angles = (torch.arange(time, device=device)[:, None] * frequencies).repeat(1, 2)[None]
        q, k = (_draw(device, batch, time, heads, size) for heads in (query_heads, key_heads))
        return [q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype)]

    letters = {"B": batch, "T": time, "HQ": query_heads, "H": key_heads, "D": size}
    numbers = 2 * batch * time * (query_heads + key_heads) * size + 2 * time * size
    return Case("rotary", letters, inputs, 2, numbers, numbers)


def cases(section: str, *, tiny: bool) -> Iterator[Case]:
    if section == "rms_norm":
        for rows, size in [(40, 24)] if tiny else [(32768, 576), (32768, 2048), (8192, 4096)]:
            for residual in (False, True):
                for trained in (False, True):
                    yield norm_case(rows, size, residual=residual, trained=trained)
    elif section == "swiglu":
        for rows, size in [(40, 24)] if tiny else [(32768, 1536), (8192, 14336)]:
            yield from (gate_case(rows, size, projections=projections) for projections in (1, 2))
    else:
        sizes = [(2, 20, 4, 2, 8)] if tiny else [(16, 2048, 9, 3, 64), (1, 8192, 32, 8, 128)]
        yield from (rotary_case(*of) for of in sizes)


SECTIONS = ("rms_norm", "swiglu", "rotary")


def ours(op: str) -> Op:
    """As a tuple of outputs, whatever their number."""
    found: dict[str, Op] = {
        "rms norm": lambda x, weight: (rms_norm(x, weight, epsilon=EPSILON),),
        "add and rms norm": lambda x, residual, weight: rms_norm(x, weight, epsilon=EPSILON, residual=residual),
        "swiglu": lambda *gate_and_up: (swiglu(*gate_and_up),),
        "rotary": rotary,
    }
    return found[op]


def eager(op: str) -> Op:
    """The same calls in the form of transformers' own."""
    run = ours(op)

    def forced(*inputs: Tensor) -> tuple[Tensor, ...]:
        with use_implementation("eager"):
            return run(*inputs)

    return forced


def liger(op: str) -> Op:
    """Liger's kernels; they take queries and keys as `[B, H, T, D]`, and no halves of one projection."""
    ops = "liger_kernel.ops"
    if op == "rms norm":
        norm = import_module(f"{ops}.rms_norm").LigerRMSNormFunction.apply
        return lambda x, weight: (norm(x, weight, EPSILON),)
    if op == "add and rms norm":
        add = import_module(f"{ops}.fused_add_rms_norm").LigerFusedAddRMSNormFunction.apply
        return lambda x, residual, weight: add(x, residual, weight, EPSILON)
    if op == "swiglu":
        gate = import_module(f"{ops}.swiglu").LigerSiLUMulFunction.apply
        return lambda one, other: (gate(one, other),)
    turn = import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.transpose(1, 2) for x in turn(q.transpose(1, 2), k.transpose(1, 2), cos, sin))

    return rotated


def forms(case: Case, *, peers: bool) -> Iterator[tuple[str, Callable[[str], Op], dict[str, str]]]:
    """Each form's name, what makes it (a peer may already raise when it is imported), and facts about it."""
    yield "ours", ours, {}
    yield "eager", eager, {}
    if peers and on_gpu() and find_spec("liger_kernel") and case.letters.get("projections") != 1:
        yield "liger", liger, {"version": version("liger-kernel")}


def leaves_of(inputs: list[Tensor], case: Case) -> list[Tensor]:
    """Fresh copies: of a peer that writes over its inputs, nobody else shall see it."""
    return [x.detach().clone().requires_grad_(n < case.trained) for n, x in enumerate(inputs)]


def error_of(run: Op, case: Case, device: str) -> float:
    """Largest relative error of outputs and gradients beside eager in fp64, on the first rows."""
    inputs = case.inputs(device)
    if case.op == "rotary":
        inputs = [x[:1, :CHECKED_ROWS] for x in inputs]
    else:
        inputs = [x[:CHECKED_ROWS] if x.ndim > 1 else x for x in inputs]
    results = []
    for form, wide in ((run, False), (eager(case.op), True)):
        leaves = leaves_of([x.double() if wide else x for x in inputs], case)
        used = [x.view_as(x) for x in leaves]  # what writes over its inputs must not be given leaves
        outputs = form(*used)
        torch.manual_seed(1)
        directions = [torch.randn(x.shape, device=device).bfloat16().to(x.dtype) for x in outputs]
        kept = [x.detach().clone() for x in outputs]
        results.append([*kept, *torch.autograd.grad(outputs, leaves[: case.trained], directions)])
    return max(relative_error(a, b) for a, b in zip(*results, strict=True))


def step_of(run: Op, leaves: list[Tensor], case: Case, *, backward: bool) -> Callable[[], Any]:
    """A forward pass, or a forward and a backward pass."""
    if not backward:

        @torch.no_grad()
        def forward() -> tuple[Tensor, ...]:
            return run(*leaves)

        return forward
    wanted = leaves[: case.trained]
    with torch.no_grad():
        directions = [torch.randn_like(x) for x in run(*leaves)]
    return lambda: torch.autograd.grad(run(*leaves), wanted, directions)


def measure(case: Case, report: Report, yardsticks: Yardsticks, *, peers: bool) -> None:
    device = "cuda" if on_gpu() else "cpu"
    torch.manual_seed(0)
    inputs = case.inputs(device)
    for name, make, facts in forms(case, peers=peers):
        label = f"{name}, {case.op}"
        run = error = None
        with report.guarded(label, "forward", case.letters):
            run = make(case.op)
            error = error_of(run, case, device)
        if run is None:
            continue
        for pass_ in ("forward", "forward+backward"):
            if pass_ == "forward" and case.letters.get("weight") == "trained":
                continue  # the same as with a frozen weight
            with report.guarded(label, pass_, case.letters):
                step = step_of(run, leaves_of(inputs, case), case, backward=pass_ != "forward")
                times = {"ms": median_ms(step), **replayed(step)}
                numbers = case.forward_numbers + (case.backward_numbers if pass_ != "forward" else 0)
                rates = yardsticks.of_copy(numbers * inputs[0].element_size(), min(times.values()))
                report.add(label, pass_, case.letters, **times, **rates, rel_error=error, **facts)


def replayed(step: Callable[[], Any]) -> dict[str, float]:
    """The time of a CUDA graph's replay, where the step can be captured."""
    try:
        return {"graph_ms": graph_ms(step, 1)}
    except (RuntimeError, torch.AcceleratorError):
        return {}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(SECTIONS), help="which, separated by commas")
    parser.add_argument("--out", type=Path, help="folder for the rows; by default results/<gpu>/ beside this script")
    parser.add_argument("--no-peers", action="store_true", help="ours and eager alone")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself; runs on a CPU")
    options = parser.parse_args(arguments)
    if not (on_gpu() or options.tiny):
        parser.error("there is no CUDA GPU: only --tiny runs without one")
    names = options.cases.split(",")
    for name in names:
        if name not in SECTIONS:
            parser.error(f"--cases: {name!r} is none of {', '.join(SECTIONS)}")
    report = Report("layer_ops", on_gpu=on_gpu() and not options.tiny, folder=options.out)
    yardsticks = Yardsticks(report, tiny=options.tiny)
    for name in names:
        with report.section(name):
            for case in cases(name, tiny=options.tiny):
                measure(case, report, yardsticks, peers=not options.no_peers)
    report.finish()


if __name__ == "__main__":
    main()
