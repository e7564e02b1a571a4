"""The distillation loss measured beside its peers: forward KL from hidden states, and its gradients.

    PYTHONPATH=kernels python kernels/benchmarks/distillation_loss.py [--cases loss,top_k] [--out FOLDER] [--tiny]

Further cases: tiles and chunks, which the table in `distillation_loss/tiles.py` was chosen from. One JSON object a
line, a file for each section, then a table. TFLOP/s are of the matrix products (`distillation_cases` counts them), the
same for all; "torch, products alone" is the time of those in cuBLAS, with all logits whole. `rel_error` is the largest
of the loss and of any gradient, beside the eager form in fp64; `worst` names the tensor. `peak_bytes` is what a forward
and a backward pass reach beyond the inputs, gradients included. Ours is timed before its peers and after them, and
by its kernels; `kernel_ms` of the sweeps is the time of the loss's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, median_ms, relative_error
from benchmarks.distillation_cases import CASES, TINY, Case, Loss, exact, leaves_of, make_inputs, ours
from benchmarks.distillation_peers import missing, peers, products
from benchmarks.gated_delta_rule import Step, kernel_times
from hybridize_kernels import top_k_distillation_loss, top_k_targets, use_implementation
from hybridize_kernels.dispatch import Implementation

PASS = "forward+backward"
FORMS: list[tuple[str, Implementation | None]] = [("ours", None), ("ours, eager", "eager")]
KEPT = 64
"""Tokens that a cached teacher keeps."""
SWEPT = [Case(8192, 576, 49152, "frozen"), Case(8192, 1536, 151936, "frozen")]
TILES = [
    f"{columns},{warps},{stages},{back}"
    for columns, warps in [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32)]
    for stages in (1, 2, 3, 4)
    for back in (0, 1)
]
CHUNKS = [32, 48, 64, 96, 128, 192, 256, 384, 512, 1024]


def step_of(loss: Loss, case: Case, inputs: list[Tensor]) -> Step:
    """Gives the loss and the gradients of what is trained."""
    leaves = leaves_of(case, inputs)

    def step() -> tuple[Tensor, ...]:
        value = loss(*inputs)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return step


def peak_bytes(step: Step) -> dict[str, int]:
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


def errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, Any]:
    names = ("loss", "gradient of hidden", "gradient of head")
    by_name = {name: relative_error(a, b) for name, a, b in zip(names, found, wanted, strict=False)}
    # NaN is larger than everything, though not by Python's comparison.
    worst = max(by_name, key=lambda name: (by_name[name] != by_name[name], by_name[name]))
    return {"rel_error": by_name[worst], "worst": worst}


def compare(case: Case, report: Report, yardsticks: Yardsticks, *, with_peers: bool) -> None:
    """Ours, the eager form, its peers, the products alone, ours again, and the kernels of ours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    letters, inputs = vars(case), make_inputs(case, device)
    wanted = exact(case, inputs)

    def row(name: str, prepare: Callable[[], Loss], **facts: Any) -> None:
        with report.guarded(name, PASS, letters):
            step = step_of(prepare(), case, inputs)
            numbers = errors(step(), wanted) | peak_bytes(step) | {"ms": median_ms(step)}
            report.add(name, PASS, letters, **numbers, **yardsticks.of_matmul(case.operations, numbers["ms"]), **facts)

    row("ours", lambda: ours)
    with use_implementation("eager"):
        row("ours, eager", lambda: ours)
    for peer in peers(case, on_gpu=device == "cuda") if with_peers else []:
        row(peer.name, peer.prepare, **peer.facts)
    with report.guarded("torch, products alone", PASS, letters):
        ms = median_ms(products(case, inputs))
        report.add("torch, products alone", PASS, letters, ms=ms, **yardsticks.of_matmul(case.operations, ms))
    row("ours, again", lambda: ours)
    with report.guarded("ours, its kernels", PASS, letters):
        for name, ms in kernel_times(step_of(ours, case, inputs)).items():
            report.add(f"ours, {name[:60]}", PASS, letters, ms=ms)


def compare_top_k(case: Case, report: Report, yardsticks: Yardsticks) -> None:
    """A cached teacher: without the teacher's product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(case, device)
    letters = {**vars(case), "k": min(KEPT, case.V)}
    ids, log_probs = top_k_targets(inputs[1], inputs[3], letters["k"])

    def loss(hidden: Tensor, _: Tensor, head: Tensor, __: Tensor) -> Tensor:
        return top_k_distillation_loss(hidden, head, ids, log_probs)[0]

    flops = case.operations - 2 * case.N * case.d * case.V
    for name, form in FORMS:
        with report.guarded(name, PASS, letters), use_implementation(form) if form else nullcontext():
            step = step_of(loss, case, inputs)
            ms = median_ms(step)
            report.add(name, PASS, letters, ms=ms, **peak_bytes(step), **yardsticks.of_matmul(flops, ms))


def sweep(overrides: Sequence[str], cases: Sequence[Case], report: Report, yardsticks: Yardsticks) -> None:
    """Ours under each override of the table; the rows carry it as their name."""
    tiles = import_module("hybridize_kernels.distillation_loss.tiles")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in cases:
        inputs = make_inputs(case, device)
        for override in overrides:
            with (
                report.guarded(override, PASS, vars(case)),
                mock.patch.dict("os.environ", {tiles.VARIABLE: override}),
            ):
                step = step_of(ours, case, inputs)
                ms = median_ms(step)
                rates = yardsticks.of_matmul(case.operations, ms)
                report.add(override, PASS, vars(case), ms=ms, **peak_bytes(step), **_of_kernel(step), **rates)


def _of_kernel(step: Step) -> dict[str, float]:
    """Milliseconds of the loss's own kernel in a step."""
    return {"kernel_ms": sum(ms for name, ms in kernel_times(step).items() if "_divergence_kernel" in name)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="loss,top_k", help="which of loss, top_k, tiles, chunks, by commas")
    parser.add_argument("--out", type=Path, help="folder for the rows; by default results/<gpu>/ beside this script")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself; runs on a CPU")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.tiny):
        parser.error("there is no CUDA GPU: only --tiny runs without one")
    cases, swept = (TINY, TINY) if options.tiny else (CASES, SWEPT)

    def losses() -> None:
        for name in missing() if on_gpu and not options.no_peers else []:
            report.add(name, PASS, {}, note="not installed")
        for case in cases:
            compare(case, report, yardsticks, with_peers=not options.no_peers)

    def top_k() -> None:
        for case in cases:
            compare_top_k(case, report, yardsticks)

    def chunks() -> None:
        overrides = [f"frozen={size};trained={size}" for size in CHUNKS]
        both = swept if options.tiny else [Case(c.N, c.d, c.V, head) for head in ("frozen", "trained") for c in swept]
        sweep(overrides, both, report, yardsticks)

    runs = {
        "loss": losses,
        "top_k": top_k,
        "tiles": lambda: sweep([f"full={tile}" for tile in TILES], swept, report, yardsticks),
        "chunks": chunks,
    }
    names = options.cases.split(",")
    for name in names:
        if name not in runs:
            parser.error(f"--cases: {name!r} is none of {', '.join(runs)}")
    report = Report("distillation_loss", on_gpu=on_gpu and not options.tiny, folder=options.out)
    yardsticks = Yardsticks(report, tiny=options.tiny)
    for name in names:
        with report.section(name):
            runs[name]()
    report.finish()


if __name__ == "__main__":
    main()
