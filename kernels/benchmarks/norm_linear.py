"""Linear layers of a decoding step: few rows, a weight that has to be read from memory, and what stands around it.

Ours in one launch, beside the kernels of its parts around the library's product, and beside that product alone, which
does less. Each graph walks over several weights, more than the second-level cache holds, so that a layer reads its
weight from memory as it would between the other layers of a model. Bytes are those of weight, inputs and outputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Report, Yardsticks, graph_ms, median_ms, relative_error
from hybridize_kernels import norm_linear, rms_norm, swiglu, use_implementation
from hybridize_kernels.norm_linear.tiles import Tile

EPSILON = 1e-5
ROTATED_BYTES = 200_000_000
MAX_WEIGHTS = 64
ROWS = (1, 4, 16)

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """R rows of D numbers, N results. norm and swiglu before and after the product; residual: a sum at the end."""

    R: int
    N: int
    D: int
    norm: bool = True
    swiglu: bool = False
    residual: bool = False

    @property
    def weight_rows(self) -> int:
        return 2 * self.N if self.swiglu else self.N


def _layers(size: int, qkv: int, attention: int, inner: int, vocabulary: int) -> list[tuple[Any, ...]]:
    """A decoder layer's four products and the head, as `Case` has them after its rows."""
    return [
        (qkv, size),
        (size, attention, False, False, True),
        (inner, size, True, True),
        (size, inner, False, False, True),
        (vocabulary, size),
    ]


MODELS = {
    "smollm2_135m": _layers(576, 960, 576, 1536, 49152),
    "qwen3_1b7": _layers(2048, 4096, 2048, 6144, 151936),
    "llama3_8b": _layers(4096, 6144, 4096, 14336, 128256),
}
TINY = [(20, 48), (24, 48, True, True), (20, 48, False, False, True)]

TILES = {
    "vector": [
        *(Tile(outputs, 1024, 4) for outputs in (1, 2, 4, 8, 16)),
        *(Tile(outputs, 2048, warps) for outputs in (2, 4, 8) for warps in (4, 8)),
        *(Tile(outputs, 4096, warps) for outputs in (2, 4, 8) for warps in (8, 16)),
    ],
    "matrix": [
        *(Tile(outputs, 128, 4, stages) for outputs in (16, 32) for stages in (4, 8)),
        *(Tile(outputs, 256, 4, stages) for outputs in (16, 32) for stages in (3, 4, 6)),
        *(Tile(outputs, 512, 8, stages) for outputs in (16, 32) for stages in (2, 3, 4)),
    ],
}
"""What `--tiles` times."""


def on_gpu() -> bool:
    return torch.cuda.is_available()


@dataclass
class Inputs:
    """The arguments of a layer but for its weight."""

    case: Case
    device: str

    def __post_init__(self) -> None:
        case = self.case
        torch.manual_seed(0)
        self.x = self._draw(case.R, case.D)
        self.options: dict[str, Any] = {
            "norm_weight": self._draw(case.D) if case.norm else None,
            "epsilon": EPSILON if case.norm else None,
            "residual": self._draw(case.R, case.N) if case.residual else None,
            "activation": "swiglu" if case.swiglu else None,
        }

    def _draw(self, *shape: int) -> Tensor:
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        return torch.randn(*shape, device=self.device).to(dtype)

    def new_weight(self) -> Tensor:
        return self._draw(self.case.weight_rows, self.case.D) / self.case.D**0.5

    def num_bytes(self, *, alone: bool = False) -> int:
        """alone: of the product, without what stands around it."""
        case = self.case
        outputs = case.weight_rows if alone else case.N * (1 + case.residual)
        numbers = case.weight_rows * case.D + case.R * (case.D + outputs)
        return numbers * self.x.element_size()


def ours(inputs: Inputs) -> Step:
    return lambda weight: norm_linear(inputs.x, weight, **inputs.options)


def in_parts(inputs: Inputs) -> Step:
    """Our kernels of norm and gate around torch's product: what a layer runs without this op."""
    case, norm_weight, residual = inputs.case, inputs.options["norm_weight"], inputs.options["residual"]

    def run(weight: Tensor) -> Tensor:
        x = rms_norm(inputs.x, norm_weight, epsilon=EPSILON) if case.norm else inputs.x
        if residual is not None:
            return torch.addmm(residual, x, weight.T)
        y = F.linear(x, weight)
        return swiglu(y) if case.swiglu else y

    return run


def alone(inputs: Inputs) -> Step:
    """Torch's product and nothing else."""
    return lambda weight: F.linear(inputs.x, weight)


def of_tile(inputs: Inputs, tile: Tile) -> Step:
    run = import_module("hybridize_kernels.norm_linear.kernel").norm_linear
    return lambda weight: run(inputs.x, weight, **inputs.options, tile=tile)


def error_of(step: Step, inputs: Inputs, weight: Tensor) -> float:
    """Beside the reference in fp64."""
    options = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.options.items()}
    rows = slice(None) if inputs.case.weight_rows * inputs.case.D < 1 << 28 else slice(0, 4096)
    with use_implementation("reference"):
        exact = norm_linear(inputs.x.double(), weight[rows].double(), **options)
    return relative_error(step(weight)[:, : exact.shape[1]], exact)


def times(step: Step, weights: list[Tensor]) -> dict[str, float]:
    """Medians of a call, and of one of a graph's."""

    def steps() -> None:
        for weight in weights:
            step(weight)

    return {"ms": median_ms(lambda: step(weights[0])), "graph_ms": graph_ms(steps, len(weights))}


def cases(model: str, all_rows: Sequence[int], *, tiny: bool) -> Iterator[Case]:
    for rows in all_rows:
        for layer in TINY if tiny else MODELS[model]:
            yield Case(rows, *layer)


def forms(inputs: Inputs, *, tiles: bool) -> Iterator[tuple[str, Step, bool]]:
    """Each form's name, what it does, and whether it does all of it."""
    yield "ours", ours(inputs), True
    yield "parts", in_parts(inputs), True
    yield "torch linear alone", alone(inputs), False
    if tiles:
        for tile in TILES["vector" if inputs.case.R == 1 else "matrix"]:
            if tile.width < 2 * max(inputs.case.D, 512):
                yield f"{tile.outputs},{tile.width},{tile.warps},{tile.stages},0", of_tile(inputs, tile), True


def measure(case: Case, report: Report, yardsticks: Yardsticks, *, tiles: bool) -> None:
    inputs = Inputs(case, "cuda" if on_gpu() else "cpu")
    first = inputs.new_weight()
    count = min(MAX_WEIGHTS, -(-ROTATED_BYTES // first.nbytes) + 1) if on_gpu() else 2
    weights = [first, *(inputs.new_weight() for _ in range(count - 1))]
    for name, step, whole in forms(inputs, tiles=tiles):
        with report.guarded(name, "decode", vars(case)):
            error = error_of(step, inputs, first) if whole else None
            numbers = times(step, weights)
            rates = yardsticks.of_copy(inputs.num_bytes(alone=not whole), numbers["graph_ms"])
            report.add(name, "decode", vars(case), **numbers, **rates, rel_error=error, weights=count)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(MODELS), help="whose layers, separated by commas")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="of x, separated by commas")
    parser.add_argument("--out", type=Path, help="folder for the rows; by default results/<gpu>/ beside this script")
    parser.add_argument("--tiles", action="store_true", help="also every tile that is worth a try")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself; runs on a CPU")
    options = parser.parse_args(arguments)
    if not (on_gpu() or options.tiny):
        parser.error("there is no CUDA GPU: only --tiny runs without one")
    names, rows = options.cases.split(","), [int(number) for number in options.rows.split(",")]
    for name in names:
        if name not in MODELS:
            parser.error(f"--cases: {name!r} is none of {', '.join(MODELS)}")
    report = Report("norm_linear", on_gpu=on_gpu() and not options.tiny, folder=options.out)
    yardsticks = Yardsticks(report, tiny=options.tiny)
    with torch.no_grad():
        for name in names:
            with report.section(name):
                for case in cases(name, rows, tiny=options.tiny):
                    measure(case, report, yardsticks, tiles=options.tiles)
    report.finish()


if __name__ == "__main__":
    main()
