"""What every benchmark needs: rows of JSON, medians, yardsticks of the machine, and CUDA graphs of a step."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import triton
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
WARMUP_MS, REPEAT_MS = 50, 200


class Report:
    """Prints one JSON object a line as it comes, keeps them, and prints a table at the end.

    Each section also goes to a file of its own, line by line, so that a run that is cut off leaves what it has measured
    and a section can be measured again by itself.
    """

    def __init__(self, op: str, *, on_gpu: bool, folder: Path | None) -> None:
        self.op, self.folder = op, folder
        self.rows: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        name = torch.cuda.get_device_name() if on_gpu else platform.machine()
        if folder is None and on_gpu:
            self.folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower())
        versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
        self._emit({"device": name, "torch": torch.__version__, "triton": triton.__version__, "versions": versions})
        self._yardsticks: list[dict[str, Any]] | None = None

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Rows inside go to `<op>-<name>.jsonl`, after those that came before all sections."""
        if self._yardsticks is None:
            self._yardsticks = list(self.rows)
        if self.folder is None:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.op}-{name}.jsonl").open("w") as self._file:
            self._file.writelines(_line(row) for row in self._yardsticks)
            try:
                yield
            finally:
                self._file = None

    def add(self, impl: str, pass_: str, case: dict[str, Any], **numbers: Any) -> None:
        """One measurement; numbers are rounded to four digits."""
        rounded = {name: _rounded(value) for name, value in numbers.items() if value is not None}
        self._emit({"op": self.op, "impl": impl, "pass": pass_, "case": case, **rounded})

    @contextmanager
    def guarded(self, impl: str, pass_: str, case: dict[str, Any]) -> Iterator[None]:
        """An error inside becomes a row: a peer that cannot do a case must not cost the others theirs."""
        try:
            yield
        except Exception as error:  # whatever a peer raises
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            self.add(impl, pass_, case, error=first_line[:300])
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def finish(self) -> None:
        print(table(self.rows))

    def _emit(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(_line(row), end="", flush=True)
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements in columns; a case as the values of its letters."""
    numbers = (
        "ms",
        "again_ms",
        "graph_ms",
        "tflops",
        "of_matmul",
        "gbs",
        "of_copy",
        "floor_ms",
        "bound",
        "ns_per_token",
        "step_bytes_per_token",
        "peak_gib",
        "rel_error",
    )
    lines = [["impl", "pass", "case", *numbers]]
    for row in rows:
        if "impl" in row:
            case = " ".join(f"{name}={value}" for name, value in row["case"].items())
            cells = [str(row.get(name, "")) for name in numbers]
            lines.append([row["impl"], row["pass"], case, *cells, *([row["error"]] if "error" in row else [])])
    used = [n for n in range(len(lines[0])) if n < 3 or any(line[n] for line in lines[1:])]
    widths = {n: max(len(line[n]) for line in lines) for n in used}
    return "\n".join(
        "  ".join([*(line[n].ljust(widths[n]) for n in used), *line[len(lines[0]) :]]).rstrip() for line in lines
    )


def median_ms(run: Callable[[], Any], *, repeat_ms: int = REPEAT_MS) -> float:
    """Median time of a call; on a GPU the second-level cache is flushed before each."""
    if torch.cuda.is_available():
        return float(
            triton.testing.do_bench(run, warmup=min(WARMUP_MS, repeat_ms), rep=repeat_ms, return_mode="median")
        )
    run()
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def graph_ms(steps: Callable[[], Any], num_steps: int) -> float:
    """Median time of one of `num_steps` that `steps` does, replayed as a CUDA graph; called directly on a CPU."""
    if not torch.cuda.is_available():
        return median_ms(steps) / num_steps
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and allocates what is kept between calls
        for _ in range(2):
            steps()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return median_ms(graph.replay) / num_steps


class Yardsticks:
    """What this machine does at this moment: bytes a second of a copy, operations a second of a bf16 product."""

    def __init__(self, report: Report, *, tiny: bool) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        numel, size = (1 << 10, 64) if tiny else (1 << 30, 8192)
        copy_ms = _copy_ms(numel, device)
        self.gbs = 4 * numel / copy_ms / 1e6  # 2 bytes a number, read and written
        report.add("torch", "copy", {"bytes": 2 * numel}, ms=copy_ms, gbs=self.gbs)
        matmul_ms = _matmul_ms(size, device)
        self.tflops = 2 * size**3 / matmul_ms / 1e9
        report.add("torch", "matmul", {"M": size, "N": size, "K": size}, ms=matmul_ms, tflops=self.tflops)

    def of_matmul(self, flops: float, ms: float) -> dict[str, float]:
        """tflops, and its share of the matrix product's."""
        tflops = flops / ms / 1e9
        return {"tflops": tflops, "of_matmul": tflops / self.tflops}

    def of_copy(self, num_bytes: float, ms: float) -> dict[str, float]:
        """gbs, and its share of the copy's."""
        gbs = num_bytes / ms / 1e6
        return {"gbs": gbs, "of_copy": gbs / self.gbs}


def _copy_ms(numel: int, device: str) -> float:
    source = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source))


def _matmul_ms(size: int, device: str) -> float:
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return median_ms(lambda: left @ right)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; NaN where there is one."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
