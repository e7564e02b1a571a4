"""Distillation on one CUDA GPU and on all of this machine: tokens a second, memory, and losses that have to be equal.

`PYTHONPATH=kernels python kernels/benchmarks/distillation_scaling.py` launches torchrun for each number of processes;
rows go to recipes/results/distillation-scaling-<gpu>.jsonl. Every run has the same steps: one process goes through as
many micro-batches in turn as there are GPUs. Models have their true sizes and random weights, texts are random tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.distillation import RESULTS, device_row, results_file
from benchmarks.distillation_models import STEPS, WARM_STEPS, Case, train
from hybridize.distillation.sharding import Sharding

WITHOUT_DROPOUT = "EG"
"""Of the scorers: what is dropped differs from process to process, and losses are compared here."""
CASES = {
    "smollm2-135m": Case("smollm2-135m", 16, 2048, WITHOUT_DROPOUT, "auto"),
    "llama-3-8b": Case("llama-3-8b", 1, 8192, WITHOUT_DROPOUT, "auto"),
}
FORMS: dict[str, Sharding | None] = {
    "replicated": None,
    "sharded": Sharding("cuda"),
    "sharded, gathered again": Sharding("cuda"),
}
"""How the models lie on several GPUs. The second keeps gathered weights where memory is left, the third never does."""
MARK = "row: "


def measurements(models: Sequence[str], count: int) -> Iterator[tuple[str, Case, Sharding | None]]:
    """(form, case, sharding) of what `count` processes measure; one process has nothing to shard."""
    for model in models:
        for form, sharding in FORMS.items():
            case = CASES[model]
            if form == "sharded, gathered again":
                case = replace(case, checkpointing=False)  # nothing is measured before, nothing kept
            if count > 1 or sharding is None:
                yield form, case, sharding


def work(models: Sequence[str], steps: int, num_gpus: int) -> None:
    """What each of the launched processes does; the first prints a row a measurement."""
    count = int(os.environ["WORLD_SIZE"])
    for form, case, sharding in measurements(models, count):
        rows, peak_bytes = train(case, accumulate=num_gpus // count, sharding=sharding, steps=steps)
        row = {
            "op": "distillation",
            "impl": form,
            "case": case.letters,
            "processes": count,
            "tokens_per_s": float(f"{median(row['tokens_per_s'] for row in rows[WARM_STEPS:-1]):.4g}"),
            "peak_bytes": int(peak_bytes),
            "losses": [row["loss"] for row in rows],
        }
        if os.environ["RANK"] == "0":
            print(MARK + json.dumps(row), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launched(models: Sequence[str], steps: int, count: int, num_gpus: int) -> Iterator[dict[str, Any]]:
    """The rows of `count` processes, as they come."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, __file__, "--work", str(num_gpus), "--models", ",".join(models), "--steps", str(steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
    if process.returncode:
        raise SystemExit(f"{count} processes ended with {process.returncode}.")


def compared(row: dict[str, Any], alone: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A row with what it is beside one process: times as fast, and the largest relative difference of a loss."""
    reference = alone[row["case"]["model"]]
    differences = (abs(a - b) / abs(b) for a, b in zip(row["losses"], reference["losses"], strict=True))
    scaling = round(row["tokens_per_s"] / reference["tokens_per_s"], 3)
    return row | {"scaling": scaling, "largest_loss_difference": max(differences)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(CASES), help="comma separated")
    parser.add_argument("--steps", type=int, default=WARM_STEPS + STEPS, help="of each run; the first ones warm up")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--work", type=int, metavar="GPUS", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    models = options.models.split(",")
    if options.work:
        work(models, options.steps, options.work)
        return
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        raise SystemExit("distillation_scaling.py compares one CUDA GPU with several, and there are none.")
    counts = [1, *(count for count in range(2, num_gpus + 1) if num_gpus % count == 0)]
    options.out.mkdir(parents=True, exist_ok=True)
    alone: dict[str, dict[str, Any]] = {}
    with results_file(options.out, "distillation-scaling").open("w") as file:
        rows = (row for count in counts for row in launched(models, options.steps, count, num_gpus))
        for row in chain((device_row(),), rows):
            if "op" in row:
                alone.setdefault(row["case"]["model"], row)
                row = compared(row, alone)
            for out in (file, sys.stdout):
                print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    main()
