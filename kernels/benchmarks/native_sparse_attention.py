"""Native sparse attention and its decoding step, measured beside their peers.

    PYTHONPATH=kernels python kernels/benchmarks/native_sparse_attention.py [--cases forward,backward] [--peers dense]

One JSON object a line, a file for each section, then a table. Every case has Gaussian and lifelike inputs
(`native_sparse_cases`); section "overlap" tells how much selections overlap in either. TFLOP/s count the operations
that the pattern needs at least, 4 D a visible (query, key or compressed key, query head) forward and 10 D more
backward, without the choice of blocks; a peer is given those of its own pattern. Ours is timed before its peers and
after them (`again_ms`). `graph_ms` is the time of a CUDA graph's replay, without what Python and launches cost;
TFLOP/s are of the shorter time. `peak_gib` is what a forward and a backward pass reach, inputs included.

`rel_error` is the largest of the output, or of any gradient, over the first tokens of one row, as many as every block
is selected for, beside the eager form in fp32. Further on, a choice between blocks that score nearly the same falls by
rounding, here or there: over the last queries of a row `late_error` is the median of |o − o'| / |o'|, and `flipped`
the share of outputs where it is above FLIPPED.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, median_ms, relative_error
from benchmarks.gated_delta_rule import Step, peak_of, replayed
from benchmarks.native_sparse_cases import KINDS, Attention, Case, Form, forms_of_ours, make_inputs, visible_pairs
from benchmarks.native_sparse_peers import PEERS, dense, peers
from benchmarks.retained_attention import captured

LATE_QUERIES = 256
FLIPPED = 0.05  # a bf16 output is right to about 0.005; one block of 16 taken for another moves it by some 0.3
LEAVES = ("q", "k", "v", "gates")

FORWARD = [Case(1, 32768, 64, 4, 128), Case(8, 4096, 64, 4, 128), Case(1, 32768, 32, 8, 128)]
BACKWARD = [Case(1, 32768, 64, 4, 128), Case(1, 32768, 32, 8, 128), Case(8, 2048, 9, 3, 64)]
CROSSOVER = [Case(1, 1024 * length, 32, 8, 128) for length in (2, 4, 8, 12, 16, 32)]
DENSE_ONLY = [Case(8, 4096, 32, 8, 128)]
"""A model has 32 heads of dense attention where it would have 64 of sparse: what those cases stand beside."""
TINY = [Case(2, 90, 4, 2, 16, W=20, BS=16, S=4)]

PARTS = {
    "attention.pool": ("block means", False),
    "attention.attend_blocks": ("compressed branch", False),
    "attention.choose_blocks": ("choice of blocks", False),
    "attention.attend_window": ("window branch", False),
    "attention.attend_selected": ("selected branch", False),
    "attention.gate_gradients": ("gradient of gates", True),
    "attention.window_gradients": ("gradient of window branch", True),
    "attention.attend_blocks_backward": ("gradient of compressed branch", True),
    "selected_gradient.lists_by_block": ("lists by block", True),
    "selected_gradient.pair_gradients": ("gradient of selected branch", True),
    "selected_gradient.query_gradient": ("sum for queries", True),
    "selected_gradient.key_gradients": ("sum for keys", True),
}
"""Functions where modules of the op call them: what they do, and whether the backward pass does it."""


def errors_of(form: Form, leaves: list[Tensor], case: Case, *, gradient: bool) -> dict[str, float]:
    """`rel_error`: what follows the first tokens has no part in their outputs, nor in these gradients."""
    tokens = min(case.T, case.S * case.BS)
    truth = [x.detach()[:1, :tokens].float().requires_grad_(gradient) for x in leaves]
    wanted = form.exact(*truth)
    with torch.set_grad_enabled(gradient):
        out = form.attend(*leaves)
    errors = [relative_error(out[:1, :tokens], wanted)]
    if gradient:
        direction = torch.zeros_like(out)
        direction[:1, :tokens].normal_()
        found = torch.autograd.grad(out, leaves, direction, allow_unused=True)
        targets = torch.autograd.grad(wanted, truth, direction[:1, :tokens].float(), allow_unused=True)
        pairs = zip(found, targets, strict=True)
        errors += [relative_error(a[:1, :tokens], b) for a, b in pairs if a is not None and b is not None]
    worst = torch.tensor(errors).max()  # NaN stays NaN
    return {
        "rel_error": float(worst),
        **(late_errors(form, leaves, out.detach(), case) if form.pattern != "dense" else {}),
    }


@torch.no_grad()
def late_errors(form: Form, leaves: list[Tensor], out: Tensor, case: Case) -> dict[str, float]:
    """Of the last queries of the first row, in the group of the first key head."""
    first, group = max(0, case.T - LATE_QUERIES), case.HQ // case.H
    q, k, v, gates = (x.detach()[:1].float() for x in leaves)
    positions = torch.arange(case.T, device=q.device)[None]
    wanted = form.exact(
        q[:, first:, :group],
        k[:, :, :1],
        v[:, :, :1],
        gates[:, first:, :group],
        query_positions=positions[:, first:],
        key_positions=positions,
    )
    error = (out[:1, first:, :group].float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return {"late_error": float(error.median()), "flipped": float((error > FLIPPED).float().mean())}


def step_of(attend: Attention, leaves: list[Tensor], *, backward: bool) -> Step:
    """A forward pass, or a forward and a backward pass."""
    if not backward:

        @torch.no_grad()
        def forward() -> tuple[Tensor, ...]:
            return (attend(*leaves),)

        return forward
    direction = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(attend(*leaves), leaves, direction, allow_unused=True)


def measure(form: Form, leaves: list[Tensor], case: Case, *, backward: bool) -> dict[str, Any]:
    errors = errors_of(form, leaves, case, gradient=backward)
    step = step_of(form.attend, leaves, backward=backward)
    return {"ms": median_ms(step), **replayed(step), **(peak_of(step) if backward else {}), **errors, **form.facts}


def compare(case: Case, others: list[Form], report: Report, yardsticks: Yardsticks, *, backward: bool) -> None:
    """Ours, its peers, ours again, and the pieces of ours."""
    pass_ = "forward+backward" if backward else "forward"
    letters, leaves = case.letters(), make_inputs(case, device(), gradient=backward)

    def row(form: Form, numbers: dict[str, Any]) -> None:
        fastest = min(numbers["ms"], numbers.get("graph_ms", numbers["ms"]))
        flops = (14 if backward else 4) * case.D * visible_pairs(case, form.pattern)
        report.add(form.name, pass_, letters, pattern=form.pattern, **numbers, **yardsticks.of_matmul(flops, fastest))

    first: dict[str, dict[str, Any]] = {}
    mine = forms_of_ours(case)
    for form in mine:
        with report.guarded(form.name, pass_, letters):
            first[form.name] = measure(form, leaves, case, backward=backward)
    for form in others:
        with report.guarded(form.name, pass_, letters):
            row(form, measure(form, leaves, case, backward=backward))
    for form in mine:
        if form.name in first:
            with report.guarded(form.name, pass_, letters):
                again = median_ms(step_of(form.attend, leaves, backward=backward))
                row(form, first[form.name] | {"again_ms": again})
    if device() == "cpu":
        return  # where no kernel runs
    with report.guarded("ours, in parts", pass_, letters), torch.no_grad():
        for label, call in parts(mine[0].attend, leaves, backward=backward):
            report.add(f"ours, {label}", pass_, letters, ms=median_ms(call), **captured(call))


def parts(attend: Attention, leaves: list[Tensor], *, backward: bool) -> list[tuple[str, Callable[[], Any]]]:
    """The op's pieces, each with what it is called with in one step."""
    calls: dict[str, list[Callable[[], Any]]] = {}

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.setdefault(name, []).append(partial(function, *args, **options))
            return function(*args, **options)

        return call

    with ExitStack() as patches, torch.enable_grad():
        for name, (_, of_backward) in PARTS.items():
            if backward or not of_backward:
                module, function = name.split(".")
                owner = import_module(f"hybridize_kernels.native_sparse_attention.{module}")
                patches.enter_context(mock.patch.object(owner, function, recording(name, getattr(owner, function))))
        out = attend(*leaves)
        if backward:
            torch.autograd.grad(out, leaves, torch.randn_like(out))
    return [(PARTS[name][0], partial(_all, of)) for name, of in calls.items()]


def _all(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def compare_dense(case: Case, report: Report, yardsticks: Yardsticks) -> None:
    """Dense attention alone, forward."""
    leaves = make_inputs(case, device())
    for form in dense(case, ("cudnn", "flash")):
        with report.guarded(form.name, "forward", case.letters()):
            numbers = measure(form, leaves, case, backward=False)
            flops = 4 * case.D * visible_pairs(case, form.pattern)
            rates = yardsticks.of_matmul(flops, min(numbers["ms"], numbers.get("graph_ms", numbers["ms"])))
            report.add(form.name, "forward", case.letters(), pattern=form.pattern, **numbers, **rates)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="forward,backward,crossover,decode,overlap", help="which, by commas")
    parser.add_argument("--inputs", default=",".join(KINDS), help="kinds of inputs, separated by commas")
    parser.add_argument("--peers", default=",".join(PEERS), help="which, by commas; FLA tunes itself for minutes")
    parser.add_argument("--no-peers", dest="peers", action="store_const", const="", help="ours alone")
    parser.add_argument("--out", type=Path, help="folder for the rows; by default results/<gpu>/ beside this script")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself; runs on a CPU")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.tiny):
        parser.error("there is no CUDA GPU: only --tiny runs without one")
    known = {"cases": ("forward", "backward", "crossover", "decode", "overlap"), "inputs": KINDS, "peers": PEERS}
    for option, names in known.items():
        given = tuple(name for name in getattr(options, option).split(",") if name)
        for name in given:
            if name not in names:
                parser.error(f"--{option}: {name!r} is none of {', '.join(names)}")
        setattr(options, option, given)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    on_gpu = torch.cuda.is_available()
    report = Report("native_sparse_attention", on_gpu=on_gpu and not options.tiny, folder=options.out)
    yardsticks = Yardsticks(report, tiny=options.tiny)

    def attention(cases: list[Case], backward: bool) -> None:
        for case in TINY if options.tiny else cases:
            for kind in options.inputs:
                # What dense attention costs does not hang on its inputs.
                names = [name for name in options.peers if name != "dense" or kind == options.inputs[0]]
                of_kind = replace(case, inputs=kind)
                compare(of_kind, peers(of_kind, names, on_gpu=on_gpu), report, yardsticks, backward=backward)

    def forward() -> None:
        attention(FORWARD, backward=False)
        if on_gpu and not options.tiny and "dense" in options.peers:
            for case in DENSE_ONLY:
                compare_dense(case, report, yardsticks)

    def crossover() -> None:
        for case in TINY if options.tiny else CROSSOVER:
            for kind in options.inputs:
                of_kind = replace(case, inputs=kind)
                asked = "dense" in options.peers and kind == options.inputs[0]
                others = dense(of_kind, ("cudnn" if on_gpu else "math",)) if asked else []
                compare(of_kind, others, report, yardsticks, backward=True)

    def overlap() -> None:
        cases = TINY if options.tiny else [*FORWARD, *BACKWARD]
        import_module("benchmarks.native_sparse_overlap").of_cases(report, cases, options.inputs, device())

    def decode() -> None:
        import_module("benchmarks.native_sparse_decode").run(report, yardsticks, tiny=options.tiny)

    runs = {
        "forward": forward,
        "backward": lambda: attention(BACKWARD, backward=True),
        "crossover": crossover,
        "decode": decode,
        "overlap": overlap,
    }
    for name in options.cases:
        with report.section(name):
            runs[name]()
    report.finish()


if __name__ == "__main__":
    main()
