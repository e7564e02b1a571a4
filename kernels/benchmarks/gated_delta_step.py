"""Decoding steps of the gated delta rule over states in place: called, and as replays of a CUDA graph.

Each graph walks over several states, more than the second-level cache holds, so that a step reads its state from memory
as it would between the other layers of a model. Bytes are those of the states, read and written, and of what goes in
and out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Report, Yardsticks, graph_ms, median_ms, relative_error
from hybridize_kernels import use_implementation
from hybridize_kernels.gated_delta_rule.step import gated_delta_rule_step
from hybridize_kernels.gated_delta_rule.step_kernel import Tile
from hybridize_kernels.gated_delta_rule.step_kernel import gated_delta_rule_step as kernel

ROTATED_BYTES = 200_000_000
MAX_STATES = 64


@dataclass(frozen=True)
class Case:
    """state: the type of its numbers. finish: raw gates, norm, scale and gate in the same launch."""

    B: int
    HS: int
    K: int
    V: int
    T: int = 1
    state: str = "float32"
    finish: bool = False


TINY = Case(2, 2, 16, 16)
CASES = [
    *(Case(batch, 16, 128, 128, state=state) for batch in (1, 64, 256) for state in ("float32", "bfloat16")),
    *(Case(batch, 16, 128, 128, finish=True) for batch in (1, 64, 256)),
    Case(64, 8, 256, 256),
    Case(64, 8, 256, 256, finish=True),
    Case(64, 16, 128, 128, T=4),
]

TILES = [Tile(8, 1), Tile(16, 1), Tile(16, 2), Tile(32, 2), Tile(32, 4), Tile(64, 4), Tile(128, 4), Tile(128, 8)]
"""What `compare_tiles` times."""


@dataclass
class Inputs:
    """The arguments of a step but for its state."""

    case: Case
    device: str

    def __post_init__(self) -> None:
        case = self.case
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device).to(dtype)

        gates = (case.B, case.T, case.HS)
        self.given: dict[str, Any] = {
            "q": draw(*gates, case.K),
            "k": draw(*gates, case.K),
            "v": draw(*gates, case.V),
            "log_decay": -torch.rand(*gates, device=self.device),
            "beta": torch.rand(*gates, device=self.device),
            "normalize_qk": True,
        }
        if case.finish:
            self.given |= {
                "decay_rate": draw(case.HS).float(),
                "decay_bias": draw(case.HS).float(),
                "beta_ceiling": 2.0,
                "norm_epsilon": 1e-6,
                "output_scale": draw(case.HS, case.V),
                "gate": draw(*gates, case.V),
            }
        num_bytes = sum(x.nbytes for x in self.given.values() if isinstance(x, Tensor))
        self.output_bytes = self.given["v"].nbytes
        self.input_bytes = num_bytes

    def new_state(self, *, key_last: bool = False) -> Tensor:
        case = self.case
        sizes = (case.V, case.K) if key_last else (case.K, case.V)
        state = torch.randn(case.B, case.HS, *sizes, device=self.device)
        return state.to(getattr(torch, case.state))

    @property
    def num_bytes(self) -> int:
        case = self.case
        numbers = case.B * case.HS * case.K * case.V
        return 2 * numbers * getattr(torch, case.state).itemsize + self.input_bytes + self.output_bytes


def times(step: Callable[[Tensor], Any], inputs: Inputs, *, key_last: bool = False) -> dict[str, float]:
    """Medians of a step, called and as one of a graph's."""
    of_one = inputs.new_state(key_last=key_last)
    on_gpu = inputs.device == "cuda"
    count = min(MAX_STATES, -(-ROTATED_BYTES // of_one.nbytes) + 1) if on_gpu else 2
    states = [of_one, *(inputs.new_state(key_last=key_last) for _ in range(count - 1))]

    def steps() -> None:
        for state in states:
            step(state)

    return {"ms": median_ms(lambda: step(of_one)), "graph_ms": graph_ms(steps, count), "states": count}


def error_of(inputs: Inputs) -> float:
    """The larger one of the output's and the state's, on the first row, against the reference in fp64."""
    rows = {name: x[:1] if _has_rows(name, x) else x for name, x in inputs.given.items()}
    state = inputs.new_state()[:1].contiguous()
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in rows.items()}
    exact_state = state.double()
    out = gated_delta_rule_step(**rows, state=state)
    with use_implementation("reference"):
        expected = gated_delta_rule_step(**exact, state=exact_state)
    return max(relative_error(out, expected), relative_error(state, exact_state))


def _has_rows(name: str, x: Any) -> bool:
    return isinstance(x, Tensor) and name not in ("decay_rate", "decay_bias", "output_scale")


def compare(report: Report, yardsticks: Yardsticks, *, tiny: bool = False) -> None:
    """Every case: ours, ours with the keys of a state last, and the peer that can do it, out of place."""
    for case in [TINY] if tiny else CASES:
        with report.guarded("ours", "decode", vars(case)):
            _compare(case, report, yardsticks)


def _compare(case: Case, report: Report, yardsticks: Yardsticks) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = Inputs(case, device)

    def row(name: str, numbers: dict[str, float], **more: Any) -> None:
        rates = yardsticks.of_copy(inputs.num_bytes, numbers["graph_ms"])
        report.add(name, "decode", vars(case), **numbers, **rates, **more)

    def ours(state: Tensor) -> Tensor:
        return gated_delta_rule_step(**inputs.given, state=state)

    error = error_of(inputs)
    first = times(ours, inputs)
    if device == "cuda":
        with report.guarded("ours, keys last", "decode", vars(case)):
            row(
                "ours, keys last",
                times(lambda state: kernel(**inputs.given, state=state, key_last=True), inputs, key_last=True),
            )
        if find_spec("fla") is not None and not case.finish:
            with report.guarded("fla fused_recurrent", "decode", vars(case)):
                row("fla fused_recurrent", times(_peer(inputs), inputs))
    row("ours", first, again_ms=times(ours, inputs)["graph_ms"], rel_error=error)


def _peer(inputs: Inputs) -> Callable[[Tensor], Any]:
    step = import_module("fla.ops.gated_delta_rule").fused_recurrent_gated_delta_rule
    given = inputs.given

    def run(state: Tensor) -> Any:
        return step(
            q=given["q"],
            k=given["k"],
            v=given["v"],
            g=given["log_decay"],
            beta=given["beta"],
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

    return run


def compare_tiles(report: Report, yardsticks: Yardsticks, cases: list[Case] | None = None) -> None:
    """Every tile in both layouts: what `step_kernel.tile_of` is chosen from."""
    for case in CASES if cases is None else cases:
        inputs = Inputs(case, "cuda")
        for key_last in (False, True):
            for tile in TILES:
                name = f"{tile.columns} columns, {tile.warps} warps{', keys last' if key_last else ''}"

                def step(state: Tensor, tile: Tile = tile, key_last: bool = key_last, inputs: Inputs = inputs) -> Any:
                    return kernel(**inputs.given, state=state, tile=tile, key_last=key_last)

                with report.guarded(name, "decode", vars(case)):
                    numbers = times(step, inputs, key_last=key_last)
                    rates = yardsticks.of_copy(inputs.num_bytes, numbers["graph_ms"])
                    report.add(name, "decode", vars(case), **numbers, **rates)
