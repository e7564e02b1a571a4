"""The gated delta rule, its decoding step and what surrounds it in a layer, measured beside their peers.

    PYTHONPATH=kernels python kernels/benchmarks/gated_delta_rule.py [--cases forward,backward] [--out FOLDER] [--tiny]

Further cases: tiles, every tile of the decoding step, which its table was chosen from. One JSON object a line, a file
for each section, then a table. TFLOP/s and GB/s are of the operations and bytes that a pass needs at least
(`gated_delta_cases` derives them), the same for all; `floor_ms` is what the one of them that takes longer, named by
`bound`, takes at the rate of a matrix product or a copy in this run. `rel_error` is the largest of the output, or of
any gradient, over the first tokens of two key heads of one row, beside the eager form in fp64; `worst` names the
tensor. Ours is timed before its peers and after them (`again_ms`). `graph_ms` is the time of a CUDA graph's replay,
without what Python and launches cost; rates are of the shorter time. `peak_gib` is what a forward and a backward pass
reach, inputs included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, graph_ms, median_ms, relative_error
from benchmarks.gated_delta_cases import (
    CASES,
    LEAVES,
    TINY,
    Case,
    Rule,
    exact,
    make_inputs,
    num_bytes,
    operations,
    ours,
)
from benchmarks.gated_delta_peers import Peer, peers

CHECKED_TOKENS = 2048
PROFILED_STEPS = 3
SAME_RESULT = 0.05  # between a call and its replay: atomic sums differ a little, an empty graph altogether

Step = Callable[[], tuple[Tensor, ...]]


def error_of(rule: Rule, leaves: list[Tensor], case: Case, *, gradient: bool, **options: Any) -> dict[str, Any]:
    """Of the first tokens of the first row: what follows them has no part in their outputs, nor in these gradients."""
    tokens = min(CHECKED_TOKENS, case.T)
    keys = sorted({0, case.H - 1})
    group = case.HV // case.H
    values = [head * group + n for head in keys for n in range(group)]
    heads = [keys, keys, values, values, values]

    def first(x: Tensor, of: list[int]) -> Tensor:
        return x.detach()[:1, :tokens, of].double()

    truth = [first(x, of).requires_grad_(gradient) for x, of in zip(leaves, heads, strict=True)]
    wanted = exact(case, truth, **options)
    with torch.set_grad_enabled(gradient):
        out = rule(*leaves)
    errors = {"output": relative_error(first(out, values), wanted)}
    if gradient:
        direction = torch.zeros_like(out)
        direction[:1, :tokens, values] = torch.randn_like(direction[:1, :tokens, values])
        found = torch.autograd.grad(out, leaves, direction)
        targets = torch.autograd.grad(wanted, truth, first(direction, values))
        for name, of, a, b in zip(LEAVES, heads, found, targets, strict=True):
            errors[f"gradient of {name}"] = relative_error(first(a, of), b)
    # NaN is larger than everything, though not by Python's comparison.
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return {"rel_error": errors[worst], "worst": worst}


def step_of(rule: Rule, leaves: list[Tensor], *, backward: bool) -> Step:
    """A forward pass, or a forward and a backward pass."""
    if not backward:

        @torch.no_grad()
        def forward() -> tuple[Tensor, ...]:
            return (rule(*leaves),)

        return forward
    direction = torch.randn_like(leaves[2])
    return lambda: torch.autograd.grad(rule(*leaves), leaves, direction)


def timed(step: Step, *, backward: bool) -> dict[str, float]:
    """Median of a step, called and replayed, and the memory that it takes."""
    return {"ms": median_ms(step), **replayed(step), **(peak_of(step) if backward else {})}


def replayed(step: Step) -> dict[str, float]:
    """The time of a CUDA graph's replay, where the step can be captured and its replay gives the same."""
    wanted, captured = step()[0], []

    def kept() -> None:
        captured[:] = step()

    try:
        ms = graph_ms(kept, 1)
    except (RuntimeError, torch.AcceleratorError):
        return {}
    return {"graph_ms": ms} if relative_error(captured[0], wanted) < SAME_RESULT else {}


def peak_of(step: Step) -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    torch.cuda.reset_peak_memory_stats()
    step()
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def kernel_times(step: Step) -> dict[str, float]:
    """Milliseconds of each kernel of a step, the longest first; none where nothing runs on a GPU."""
    if not torch.cuda.is_available():
        return {}
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    found = [
        (event.key, event.self_device_time_total / 1e3 / PROFILED_STEPS)
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return dict(sorted(found, key=lambda pair: -pair[1]))


def variants(backward: bool) -> dict[str, dict[str, Any]]:
    """Ours in other forms than the default, by the options that ask for them."""
    found: dict[str, dict[str, Any]] = {"ours, normalising q and k": {"normalize_qk": True}}
    return found | ({"ours, states recomputed": {"store_states": False}} if backward else {})


def compare(case: Case, report: Report, yardsticks: Yardsticks, *, backward: bool, with_peers: bool) -> None:
    """Ours, its other forms, its peers, ours again, and the kernels of ours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pass_ = "forward+backward" if backward else "forward"
    letters, leaves = case.letters(), make_inputs(case, device, gradient=backward)
    flops, moved = operations(case, backward=backward), num_bytes(case, backward=backward)
    floors = {"operations": flops / yardsticks.tflops / 1e9, "bytes": moved / yardsticks.gbs / 1e6}
    bound = max(floors, key=floors.__getitem__)

    def measure(name: str, rule: Rule, options: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """None where it raised, which has its row by then."""
        with report.guarded(name, pass_, letters):
            error = error_of(rule, leaves, case, gradient=backward, **(options or {}))
            return timed(step_of(rule, leaves, backward=backward), backward=backward) | error
        return None

    def row(name: str, numbers: dict[str, Any]) -> None:
        fastest = min(numbers["ms"], numbers.get("graph_ms", numbers["ms"]))
        rates = yardsticks.of_matmul(flops, fastest) | yardsticks.of_copy(moved, fastest)
        report.add(name, pass_, letters, **numbers, **rates, floor_ms=floors[bound], bound=bound)

    def of_peer(peer: Peer) -> None:
        numbers = None
        with report.guarded(peer.name, pass_, letters), peer.around():
            numbers = measure(peer.name, lambda *inputs: prepared(peer)(*inputs))
        if numbers is not None:
            row(peer.name, numbers | peer.facts)
        elif peer.otherwise is not None:
            of_peer(peer.otherwise)

    rules: dict[str, Rule] = {}

    def prepared(peer: Peer) -> Rule:
        # Inside of what is guarded: a peer may already raise when it is imported.
        if peer.name not in rules:
            rules[peer.name] = peer.prepare(case, device)
        return rules[peer.name]

    rule = ours(case, device)
    first = measure("ours", rule)
    for name, options in variants(backward).items():
        # Where states are kept is no part of the result, and the eager form has no say in it.
        of_result = {key: value for key, value in options.items() if key != "store_states"}
        numbers = measure(name, ours(case, device, **options), of_result)
        if numbers is not None:
            row(name, numbers)
    for peer in peers(case, on_gpu=device == "cuda", backward=backward) if with_peers else []:
        of_peer(peer)
    if first is None:
        return
    step = step_of(rule, leaves, backward=backward)
    with report.guarded("ours", pass_, letters):
        row("ours", first | {"again_ms": median_ms(step)})
    with report.guarded("ours, its kernels", pass_, letters):
        for name, ms in kernel_times(step).items():
            report.add(f"ours, {name[:60]}", pass_, letters, ms=ms)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="forward,backward,decode,parts", help="which, separated by commas")
    parser.add_argument("--out", type=Path, help="folder for the rows; by default results/<gpu>/ beside this script")
    parser.add_argument("--no-peers", action="store_true", help="ours alone, which compiles for less long")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself; runs on a CPU")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.tiny):
        parser.error("there is no CUDA GPU: only --tiny runs without one")

    def rule(backward: bool) -> None:
        for case in TINY if options.tiny else CASES:
            compare(case, report, yardsticks, backward=backward, with_peers=not options.no_peers)

    def module(name: str) -> None:
        import_module(f"benchmarks.{name}").compare(report, yardsticks, tiny=options.tiny)

    runs = {
        "forward": lambda: rule(backward=False),
        "backward": lambda: rule(backward=True),
        "decode": lambda: module("gated_delta_step"),
        "parts": lambda: module("gated_delta_parts"),
        "tiles": lambda: import_module("benchmarks.gated_delta_step").compare_tiles(report, yardsticks),  # on a GPU
    }
    names = options.cases.split(",")
    for name in names:
        if name not in runs:
            parser.error(f"--cases: {name!r} is none of {', '.join(runs)}")
    report = Report("gated_delta_rule", on_gpu=on_gpu and not options.tiny, folder=options.out)
    yardsticks = Yardsticks(report, tiny=options.tiny)
    for name in names:
        with report.section(name):
            runs[name]()
    report.finish()


if __name__ == "__main__":
    main()
