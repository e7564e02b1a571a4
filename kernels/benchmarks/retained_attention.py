"""Retained attention, its decoding step and column statistics, measured beside their peers.

    PYTHONPATH=kernels python kernels/benchmarks/retained_attention.py [--cases forward,decode] [--out FILE] [--tiny]

One JSON object a line, then a table. TFLOP/s count the operations that the pattern needs at least, 4 D a visible
(query, key, query head) forward and 10 D more backward; a dense or window-only peer is given those of its own pattern.
`rel_error` is the largest of the output, or of any gradient, over the first tokens of one row, beside the reference in
fp32. Ours is timed before its peers and after them (`again_ms`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, median_ms, relative_error
from benchmarks.retained_peers import Attention, peers
from hybridize_kernels import retained_attention, use_implementation

CHECKED_TOKENS = 2048


@dataclass(frozen=True)
class Case:
    """Letters as everywhere; R: retained tokens a key head; capped: a budget of R over half of all tokens."""

    B: int
    T: int
    HQ: int
    H: int
    D: int
    W: int
    R: int
    capped: bool = False
    flex: bool = False

    def letters(self) -> dict[str, int | bool]:
        return {name: getattr(self, name) for name in ("B", "T", "HQ", "H", "D", "W", "R", "capped")}

    @property
    def budget(self) -> int | None:
        return self.R if self.capped else None


FORWARD = [
    Case(1, 32768, 32, 8, 128, 512, 512, flex=True),
    Case(8, 4096, 32, 8, 64, 512, 512),
    Case(1, 32768, 32, 8, 128, 512, 4096),
]
BACKWARD = [Case(1, 32768, 32, 8, 128, 512, 512, flex=True), Case(8, 2048, 9, 3, 64, 256, 256, flex=True)]
MEMORY = [Case(1, 1024 * length, 32, 8, 128, 512, 512) for length in (8, 16, 32, 64, 128)]
TINY = Case(2, 96, 4, 2, 16, 16, 8, flex=True)


def make_inputs(case: Case, device: str, *, gradient: bool = False) -> list[Tensor]:
    """q, k, v and score: R random tokens of each key head score above 0, or half of all where there is a cap."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(case.B, case.T, heads, case.D, device=device).to(dtype) for heads in (case.HQ, case.H, case.H)
    )
    value = torch.rand(case.B, case.T, case.H, device=device)
    kept = value > 0.5
    if not case.capped:
        kept = torch.zeros_like(kept).scatter_(1, value.argsort(1)[:, : case.R], True)
    score = torch.where(kept, value.clamp(min=1e-3), -1.0)
    return [x.requires_grad_(gradient) for x in (q, k, v, score)]


def visible_pairs(case: Case, score: Tensor, pattern: str) -> int:
    """(query, key, query head) triples that the pattern sees, exactly."""
    column = torch.arange(case.T, device=score.device)
    width = case.T if pattern == "dense" else case.W
    pairs = int((column + 1).clamp(max=width).sum()) * case.B * case.H
    if pattern == "retained":
        far = (score > 0).cumsum(1)[:, : max(0, case.T - case.W)]  # [B, T − W, H]: kept keys that have left the window
        pairs += int((far.clamp(max=case.R) if case.capped else far).sum())
    return pairs * (case.HQ // case.H)


def ours(score: Tensor, case: Case) -> Attention:
    return lambda q, k, v: retained_attention(q, k, v, score, window=case.W, budget=case.budget)


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


def timed(attend: Attention, inputs: list[Tensor], *, backward: bool) -> float:
    """Median of a forward pass, or of a forward and a backward pass."""
    q, k, v = inputs[:3]
    if not backward:
        with torch.no_grad():
            return median_ms(lambda: attend(q, k, v))
    direction = torch.randn_like(q)
    return median_ms(lambda: torch.autograd.grad(attend(q, k, v), inputs, direction, allow_unused=True))


def compare(case: Case, report: Report, yardsticks: Yardsticks, *, backward: bool, flex: bool) -> None:
    """Ours, its peers, ours again, and the pieces of ours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pass_ = "forward+backward" if backward else "forward"
    letters = case.letters()
    inputs = make_inputs(case, device, gradient=backward)
    score = inputs[3]

    def row(name: str, pattern: str, ms: float, factor: int = 14 if backward else 4, **more: Any) -> None:
        flops = factor * case.D * visible_pairs(case, score, pattern)
        report.add(name, pass_, letters, pattern=pattern, ms=ms, **yardsticks.of_matmul(flops, ms), **more)

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
            row(peer.name, peer.pattern, timed(prepared, inputs, backward=backward), rel_error=peer_error, **more)
    if first is None:
        return
    with report.guarded("ours", pass_, letters):
        again = timed(attend, inputs, backward=backward)
        row("ours", "retained", first, again_ms=again, rel_error=error)
    with report.guarded("ours, in parts", pass_, letters), torch.no_grad():
        for name, factor, call in parts(attend, inputs, backward=backward):
            row(f"ours, {name}", "retained", median_ms(call), factor)


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


def training_step(case: Case, report: Report, yardsticks: Yardsticks) -> None:
    """Memory and time of a forward and a backward pass, which should grow with T alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with report.guarded("ours", "training step", case.letters()):
        inputs = make_inputs(case, device, gradient=True)
        attend, direction = ours(inputs[3], case), torch.randn_like(inputs[0])

        def step() -> None:
            torch.autograd.grad(attend(*inputs[:3]), inputs, direction)

        step()  # compiles
        numbers: dict[str, float] = {}
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            step()
            peak = torch.cuda.max_memory_allocated()
            numbers = {"peak_gib": peak / 2**30, "step_bytes_per_token": (peak - held) / case.T}
        ms = median_ms(step)
        flops = 14 * case.D * visible_pairs(case, inputs[3], "retained")
        numbers |= {"ns_per_token": 1e6 * ms / (case.B * case.T), **yardsticks.of_matmul(flops, ms)}
        report.add("ours", "training step", case.letters(), ms=ms, **numbers)


def both(cases: list[Case]) -> list[Case]:
    return [replace(case, capped=capped) for case in cases for capped in (False, True)]


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks import columns, retained_decode

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="forward,backward,decode,memory,columns", help="which, separated by commas")
    parser.add_argument("--out", type=Path, help="file for the rows; by default results/<gpu>/ beside this script")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles for long")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself; runs on a CPU")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.tiny):
        parser.error("there is no CUDA GPU: only --tiny runs without one")
    report = Report("retained_attention", on_gpu=on_gpu and not options.tiny, out=options.out)
    yardsticks = Yardsticks(report, tiny=options.tiny)

    def attention(cases: list[Case], backward: bool) -> None:
        for case in both([TINY] if options.tiny else cases):
            compare(case, report, yardsticks, backward=backward, flex=not options.no_flex)

    def memory() -> None:
        for case in both([TINY] if options.tiny else MEMORY):
            training_step(case, report, yardsticks)

    runs = {
        "forward": lambda: attention(FORWARD, backward=False),
        "backward": lambda: attention(BACKWARD, backward=True),
        "decode": lambda: retained_decode.run(report, yardsticks, tiny=options.tiny),
        "memory": memory,
        "columns": lambda: columns.run(report, yardsticks, tiny=options.tiny),
        "columns-tiles": lambda: columns.run_tiles(report, yardsticks),
    }
    for name in options.cases.split(","):
        if name not in runs:
            parser.error(f"--cases: {name!r} is none of {', '.join(runs)}")
    for name in options.cases.split(","):
        runs[name]()
    report.finish()


if __name__ == "__main__":
    main()
