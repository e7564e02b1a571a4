"""Retained attention, its decoding step and column statistics, measured beside their peers.

    PYTHONPATH=kernels python kernels/benchmarks/retained_attention.py [--cases forward,decode] [--out FOLDER] [--tiny]

One JSON object a line, a file for each case, then a table. TFLOP/s count the operations that the pattern needs at
least, 4 D a visible (query, key, query head) forward and 10 D more backward; a dense or window-only peer is given those
of its own pattern. `rel_error` is the largest of the output, or of any gradient, over the first tokens of one row,
beside the reference in fp32. Ours is timed before its peers and after them (`again_ms`). `graph_ms` is the time of a
CUDA graph's replay, without what Python and launches cost; TFLOP/s are of the shorter time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, graph_ms, median_ms, relative_error
from benchmarks.retained_cases import TINY, Attention, Case, make_inputs, ours, visible_pairs
from benchmarks.retained_peers import peers
from hybridize_kernels import retained_attention, use_implementation

CHECKED_TOKENS = 2048


FORWARD = [
    Case(1, 32768, 32, 8, 128, 512, 512, flex=True),
    Case(8, 4096, 32, 8, 64, 512, 512),
    Case(1, 32768, 32, 8, 128, 512, 4096),
]
BACKWARD = [Case(1, 32768, 32, 8, 128, 512, 512, flex=True), Case(8, 2048, 9, 3, 64, 256, 256, flex=True)]


def error_of(attend: Attention, inputs: list[Tensor], case: Case, pattern: str, *, gradient: bool) -> float:
    """Of the first tokens of the first row: what follows them has no part in their outputs, nor in these gradients."""
    exact = [x.detach()[:1, :CHECKED_TOKENS].float().requires_grad_(gradient) for x in inputs]
    q, k, v, score = exact
    retained = pattern == "retained"
    with use_implementation("reference"):
        wanted = retained_attention(
            q,
            k,
            v,
            score if retained else None,
            window=case.T if pattern == "dense" else case.W,
            budget=case.budget if retained else None,
        )
    with torch.set_grad_enabled(gradient):
        out = attend(*inputs[:3])
    worst = relative_error(out[:1, :CHECKED_TOKENS], wanted)
    if not gradient:
        return worst
    direction = torch.zeros_like(out)
    direction[:1, :CHECKED_TOKENS].normal_()
    found = torch.autograd.grad(out, inputs, direction, allow_unused=True)
    targets = torch.autograd.grad(wanted, exact, direction[:1, :CHECKED_TOKENS].float(), allow_unused=True)
    pairs = [
        (a[:1, :CHECKED_TOKENS], b) for a, b in zip(found, targets, strict=True) if a is not None and b is not None
    ]
    return max(worst, *(relative_error(a, b) for a, b in pairs))


def timed(attend: Attention, inputs: list[Tensor], *, backward: bool) -> dict[str, float]:
    """Median of a forward pass, or of a forward and a backward pass: called, and replayed as a CUDA graph.

    The second leaves out what Python and the launches cost where they take longer than the kernels.
    """
    q, k, v = inputs[:3]
    if not backward:
        with torch.no_grad():
            return {"ms": median_ms(lambda: attend(q, k, v)), **captured(lambda: attend(q, k, v))}
    direction = torch.randn_like(q)

    def step() -> Any:
        return torch.autograd.grad(attend(q, k, v), inputs, direction, allow_unused=True)

    return {"ms": median_ms(step), **captured(step)}


def captured(step: Callable[[], Any]) -> dict[str, float]:
    """The time of a replay, where the step can be captured."""
    try:
        return {"graph_ms": graph_ms(step, 1)}
    except (RuntimeError, torch.AcceleratorError):
        return {}


def compare(case: Case, report: Report, yardsticks: Yardsticks, *, backward: bool, flex: bool) -> None:
    """Ours, its peers, ours again, and the pieces of ours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pass_ = "forward+backward" if backward else "forward"
    letters = case.letters()
    inputs = make_inputs(case, device, gradient=backward)
    score = inputs[3]

    def row(name: str, pattern: str, factor: int = 14 if backward else 4, **numbers: Any) -> None:
        if factor:
            fastest = min(numbers["ms"], numbers.get("graph_ms", numbers["ms"]))
            numbers |= yardsticks.of_matmul(factor * case.D * visible_pairs(case, score, pattern), fastest)
        report.add(name, pass_, letters, pattern=pattern, **numbers)

    attend, first, error = ours(score, case), None, None
    with report.guarded("ours", pass_, letters):
        error = error_of(attend, inputs, case, "retained", gradient=backward)
        first = timed(attend, inputs, backward=backward)
    # A cap changes nothing for a peer: one line of each is enough.
    found = [] if case.capped else peers(on_gpu=device == "cuda", with_flex=flex and case.flex)
    for peer in found:
        if backward and not peer.has_gradient:
            continue
        with report.guarded(peer.name, pass_, letters):
            prepared, more = peer.prepare(score.detach(), case.W, case.budget, case.HQ)
            peer_error = error_of(prepared, inputs, case, peer.pattern, gradient=backward)
            row(peer.name, peer.pattern, **timed(prepared, inputs, backward=backward), rel_error=peer_error, **more)
    if first is None:
        return
    with report.guarded("ours", pass_, letters):
        again = timed(attend, inputs, backward=backward)["ms"]
        row("ours", "retained", **first, again_ms=again, rel_error=error)
    with report.guarded("ours, in parts", pass_, letters), torch.no_grad():
        for name, factor, call in parts(attend, inputs, backward=backward):
            row(f"ours, {name}", "retained", factor, ms=median_ms(call), **captured(call))


def parts(attend: Attention, inputs: list[Tensor], *, backward: bool) -> list[tuple[str, int, Callable[[], Any]]]:
    """The op's pieces, each with what it is called with and its operations in D a pair; none where no kernel runs."""
    if not inputs[0].is_cuda:
        return []
    module = import_module("hybridize_kernels.retained_attention.attention")
    pieces = {"retained_lists": ("index lists", 0), "attend": ("forward kernel", 4)}
    if backward:
        pieces["attend_backward"] = ("backward kernels", 10)
    calls: dict[str, Callable[[], Any]] = {}

    def recording(name: str) -> Callable[..., Any]:
        function = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            calls[name] = partial(function, *args, **options)
            return function(*args, **options)

        return call

    recorders: dict[str, Any] = {name: recording(name) for name in pieces}
    with mock.patch.multiple(module, **recorders), torch.enable_grad():
        out = attend(*inputs[:3])
        if backward:
            torch.autograd.grad(out, inputs, torch.randn_like(out))
    return [(*pieces[name], call) for name, call in calls.items()]


def both(cases: list[Case]) -> list[Case]:
    return [replace(case, capped=capped) for case in cases for capped in (False, True)]


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks import columns, retained_decode, retained_training

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="forward,backward,decode,memory,columns", help="which, separated by commas")
    parser.add_argument("--out", type=Path, help="folder for the rows; by default results/<gpu>/ beside this script")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles for long")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself; runs on a CPU")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.tiny):
        parser.error("there is no CUDA GPU: only --tiny runs without one")
    report = Report("retained_attention", on_gpu=on_gpu and not options.tiny, folder=options.out)
    yardsticks = Yardsticks(report, tiny=options.tiny)

    def attention(cases: list[Case], backward: bool) -> None:
        for case in both([TINY] if options.tiny else cases):
            compare(case, report, yardsticks, backward=backward, flex=not options.no_flex)

    runs = {
        "forward": lambda: attention(FORWARD, backward=False),
        "backward": lambda: attention(BACKWARD, backward=True),
        "decode": lambda: retained_decode.run(report, yardsticks, tiny=options.tiny),
        "memory": lambda: retained_training.run(report, yardsticks, tiny=options.tiny),
        "columns": lambda: columns.run(report, yardsticks, tiny=options.tiny),
        "columns-tiles": lambda: columns.run_tiles(report, yardsticks),
    }
    for name in options.cases.split(","):
        if name not in runs:
            parser.error(f"--cases: {name!r} is none of {', '.join(runs)}")
    for name in options.cases.split(","):
        with report.section(name):
            runs[name]()
    report.finish()


if __name__ == "__main__":
    main()
