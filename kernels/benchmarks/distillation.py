"""Distillation beside plain training on a CUDA GPU: tokens a second and memory of whole steps.

`PYTHONPATH=kernels python kernels/benchmarks/distillation.py`; rows go to recipes/results/distillation-<gpu>.jsonl.
Models have their true sizes and random weights, texts are random tokens: neither changes the time.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from benchmarks.distillation_models import Case, distillation, forward_alone, plain_training

RESULTS = Path(__file__).resolve().parents[2] / "recipes" / "results"
SMALL = "smollm2-135m"
SHORT, LONG = Case(SMALL, 16, 2048), Case(SMALL, 2, 16384)

Measure = Callable[[], dict[str, float]]


def sections() -> dict[str, list[tuple[str, Case, Measure]]]:
    """What is measured, by the name of its section: (impl, case, how)."""
    at_4k, at_32k, large = Case(SMALL, 8, 4096), Case(SMALL, 1, 32768), Case("llama-3-8b", 1, 8192)
    return {
        "step": [
            *(("transformers training", case, lambda case=case: plain_training(case)) for case in (SHORT, LONG)),
            *(("transformers forward", case, lambda case=case: forward_alone(case)) for case in (SHORT, LONG)),
            *(("ours", case, lambda case=case: distillation(case)) for case in (SHORT, LONG)),
        ],
        "align": [("ours, align", SHORT, lambda: distillation(SHORT, kind="align"))],
        "cached": [
            ("ours, teacher cached", case, lambda case=case: distillation(case, live=False)) for case in (at_4k, at_32k)
        ],
        "8b": [("ours", large, lambda: distillation(large))],
    }


def device_row() -> dict[str, Any]:
    """What every file of rows begins with: the GPU and the versions."""
    versions = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }
    device = torch.cuda.get_device_name()
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "versions": versions}


def results_file(folder: Path, name: str) -> Path:
    """The file of rows of a benchmark on this GPU."""
    return folder / f"{name}-{re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower())}.jsonl"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(sections()), help="sections, comma separated")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("distillation.py times a CUDA GPU, and there is none.")
    rows: list[dict[str, Any]] = [device_row()]
    print(json.dumps(rows[0]), flush=True)
    chosen = options.cases.split(",")
    for section, measurements in sections().items():
        for impl, case, measure in measurements if section in chosen else ():
            row: dict[str, Any] = {"op": "distillation", "impl": impl, "case": case.letters}
            try:
                found = measure()
                row |= {name: float(f"{value:.4g}") for name, value in found.items()}
                row["peak_bytes"] = int(found["peak_bytes"])
            except (RuntimeError, ValueError) as error:  # one case must not cost the others theirs
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            gc.collect()
            torch.cuda.empty_cache()
            rows.append(row)
            print(json.dumps(row), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    results_file(options.out, "distillation").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
