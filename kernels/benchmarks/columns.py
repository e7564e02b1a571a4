"""What is summed over a key's far queries: column statistics, each pass alone, up to 128k tokens; gate gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, median_ms, relative_error
from hybridize_kernels import attention_log_sum_exp, column_statistics, gate_gradient, use_implementation

WINDOW = 512
LENGTHS = (8192, 32768, 131072)
HEADS = ((32, 8, 128), (9, 3, 64))
EAGER_LENGTH = 8192
GATE_TILES = ("64,128,4,2", "64,128,4,3", "64,128,8,2", "128,128,8,2", "64,64,4,2", "64,64,4,3", "128,64,4,2")
TILES = (
    "128,128,4,2",
    "128,128,8,2",
    "128,128,8,3",
    "64,128,4,2",
    "64,128,4,3",
    "128,64,4,2",
    "128,64,4,3",
    "256,128,8,2",
)


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    HQ: int
    H: int
    D: int
    W: int


GATE_CASE = Case(2, 8192, 9, 3, 64, WINDOW)
"""Measured of both: two products and a sigmoid a pair beside one product and an exponential."""


def make_inputs(case: Case) -> tuple[Tensor, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k = (torch.randn(case.B, case.T, heads, case.D, device=device) for heads in (case.HQ, case.H))
    return (q.bfloat16(), k.bfloat16()) if device == "cuda" else (q, k)


def error_of(case: Case) -> float:
    """Largest relative error of the three results in the case's shapes, on a shorter text."""
    short = Case(1, min(case.T, 1500), case.HQ, case.H, case.D, min(case.W, 500))
    q, k = make_inputs(short)
    found = (attention_log_sum_exp(q, k), *column_statistics(q, k, window=short.W))
    with use_implementation("reference"):
        q, k = q.double(), k.double()
        wanted = (attention_log_sum_exp(q, k), *column_statistics(q, k, window=short.W))
    worst = 0.0
    for actual, expected in zip(found, wanted, strict=True):
        assert actual is not None
        assert expected is not None
        finite = expected.isfinite()
        worst = max(worst, relative_error(actual[finite], expected[finite]))
    return worst


def measure(case: Case, report: Report, yardsticks: Yardsticks, *, impl: str, **more: Any) -> None:
    q, k = make_inputs(case)
    num_heads = case.B * case.HQ
    log_sum_exp = attention_log_sum_exp(q, k)
    far = max(0, case.T - case.W)
    passes = {
        "log-sum-exp": (lambda: attention_log_sum_exp(q, k), case.T * (case.T + 1)),
        "largest": (lambda: column_statistics(q, k, log_sum_exp, window=case.W, need_sum=False), far * (far + 1)),
        "largest and sum": (lambda: column_statistics(q, k, log_sum_exp, window=case.W), far * (far + 1)),
    }
    for name, (call, twice_pairs) in passes.items():
        with report.guarded(impl, name, vars(case)):
            ms = median_ms(call)
            report.add(
                impl, name, vars(case), ms=ms, **yardsticks.of_matmul(case.D * num_heads * twice_pairs, ms), **more
            )


def gate_inputs(case: Case) -> tuple[Tensor, ...]:
    """q, k, v, do, log-sum-exp, delta and exits: one key in eight is shown, for a while."""
    q, k = make_inputs(case)
    v, d_output = torch.randn_like(k), torch.randn_like(q)
    exits = torch.randint(0, case.T + 1, k.shape[:3], device=q.device)
    exits *= torch.rand(k.shape[:3], device=q.device) < 1 / 8
    return q, k, v, d_output, attention_log_sum_exp(q, k), torch.randn(q.shape[:3], device=q.device), exits


def measure_gates(case: Case, report: Report, yardsticks: Yardsticks, *, impl: str) -> None:
    """With and without the keys that are hidden, with the largest relative error on a shorter text."""
    short = gate_inputs(Case(1, min(case.T, 1500), case.HQ, case.H, case.D, case.W))
    exact, inputs = [x.double() for x in short[:-1]], gate_inputs(case)
    far = max(0, case.T - case.W)
    flops = 2 * case.D * case.B * case.HQ * far * (far + 1)
    for hidden in (False, True):
        name = f"gate gradient{', hidden keys too' * hidden}"
        with report.guarded(impl, name, vars(case)):
            with use_implementation("reference"):
                wanted = gate_gradient(*exact, short[-1], window=case.W, hidden=hidden, on="logit")
            error = relative_error(gate_gradient(*short, window=case.W, hidden=hidden, on="logit"), wanted)
            ms = median_ms(lambda hidden=hidden: gate_gradient(*inputs, window=case.W, hidden=hidden, on="logit"))
            report.add(impl, name, vars(case), ms=ms, rel_error=error, **yardsticks.of_matmul(flops, ms))


def run(report: Report, yardsticks: Yardsticks, *, tiny: bool) -> None:
    small = Case(1, 96, 4, 2, 16, 16)
    cases = [Case(1, time, *heads, WINDOW) for heads, time in itertools.product(HEADS, LENGTHS)]
    for case in [small] if tiny else [*cases, GATE_CASE]:
        with report.guarded("ours", "column statistics", vars(case)):
            error = error_of(case)
            measure(case, report, yardsticks, impl="ours", rel_error=error)
        if case.T == EAGER_LENGTH:
            with report.guarded("eager", "column statistics", vars(case)), use_implementation("eager"):
                measure(case, report, yardsticks, impl="eager")
    measure_gates(small if tiny else GATE_CASE, report, yardsticks, impl="ours")


def run_tiles(report: Report, yardsticks: Yardsticks) -> None:
    """The tiles that may do for the tables of `column_statistics`, at 32k, and of `gate_gradient`."""
    tiles = import_module("hybridize_kernels.column_statistics.tiles")
    for heads in HEADS:
        case = Case(1, 32768, *heads, WINDOW)
        for name in TILES:
            override = {tiles.VARIABLE: f"log_sum_exp={name};statistics={name}"}
            with report.guarded(name, "column statistics", vars(case)), mock.patch.dict("os.environ", override):
                measure(case, report, yardsticks, impl=name, rel_error=error_of(case))
    tiles = import_module("hybridize_kernels.gate_gradient.tiles")
    for head_size, name in itertools.product((64, 128), GATE_TILES):
        with mock.patch.dict("os.environ", {tiles.VARIABLE: name}):
            measure_gates(replace(GATE_CASE, D=head_size), report, yardsticks, impl=name)
