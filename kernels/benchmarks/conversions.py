"""Rows of finished runs, one a run: what a conversion costs and what it keeps.

`PYTHONPATH=kernels python kernels/benchmarks/conversions.py RUN... [--out recipes/results]` reads recipe.lock.json,
results.json (suite `needles`, held-out texts: essays) and distill/metrics.jsonl of run folders that `hybridize run`
made; it appends to conversions.jsonl and keeps these and the plan beside it. A folder's name up
to its first dot names the recipe: lte, lte.10M and lte.again are three runs of one. Then it draws the rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.conversion_charts import draw

RESULTS = Path(__file__).resolve().parents[2] / "recipes" / "results"
Z_95 = 1.96
NEEDLES = {"niah1_4k": "niah_single_1", "niah2_4k": "niah_single_2"}
LENGTH = "4096"
KEPT = ("recipe.lock.json", "plan.json", "distill/metrics.jsonl", "results.json")
"""Of a run folder. The plan has all settings of every layer, those too that the recipe leaves to a default."""
POSITIONS = (2048, 4096)


def row_of(run: Path) -> dict[str, Any]:
    """The row of a run folder.

    Returns:
        recipe, tokens, seed, seconds of training, ppl_ratio, niah1_4k, niah2_4k, state_bytes_8k, kl, top1; the first
        three measures and their teacher's with 95 % intervals under "intervals" and "teacher"; "device" and "versions".
    """
    lock = json.loads((run / "recipe.lock.json").read_text(encoding="utf-8"))
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    last = json.loads((run / "distill" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    probes = results["probes"]
    place = next(r for r in probes["perplexity"]["by_position"] if (r["from"], r["to"]) == POSITIONS)
    cells = {name: probes["recall"]["tasks"][task][LENGTH] for name, task in NEEDLES.items()}
    reach = Z_95 * place["ratio_se"]
    intervals = {"ppl_ratio": [place["ratio"] - reach, place["ratio"] + reach]}
    intervals |= {name: [cell["student"]["low"], cell["student"]["high"]] for name, cell in cells.items()}
    provenance = results["provenance"]
    return {
        "recipe": run.name.split(".")[0],
        "run": run.name,
        "tokens": last["tokens"],
        "seed": lock["recipe"]["seed"],
        "train_seconds": last["seconds"],
        "ppl_ratio": place["ratio"],
        **{name: cell["student"]["share"] for name, cell in cells.items()},
        "state_bytes_8k": probes["state_bytes"]["student"],
        "kl": probes["agreement"]["kl"],
        "top1": probes["agreement"]["top1"],
        "intervals": intervals,
        "samples": cells["niah1_4k"]["student"]["samples"],
        "teacher": {
            "ppl": place["teacher"],
            **{name: cell["teacher"]["share"] for name, cell in cells.items()},
            "state_bytes_8k": probes["state_bytes"]["teacher"],
        },
        "device": provenance.get("device"),
        "versions": provenance.get("versions"),
    }


def keep(run: Path, out: Path) -> dict[str, Any]:
    """Appends a run's row, unless the same stands there, and copies what is KEPT."""
    row = row_of(run)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "conversions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    line = json.dumps(row)
    if line not in lines:
        path.write_text("".join(f"{each}\n" for each in (*lines, line)), encoding="utf-8")
    folder = out / "conversions" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(run / name, folder / Path(name).name)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for run in options.runs:
        print(json.dumps(keep(run, options.out)), flush=True)
    lines = (options.out / "conversions.jsonl").read_text(encoding="utf-8").splitlines()
    draw([json.loads(line) for line in lines], options.out)


if __name__ == "__main__":
    main()
