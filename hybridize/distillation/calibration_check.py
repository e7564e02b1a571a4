"""Whether calibration tells the truth: what it predicts of a run beside what the run then takes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from hybridize.distillation.calibration import SECONDS, Calibration, calibrate
from hybridize.distillation.memory import meter_of
from hybridize.distillation.processes import start_processes
from hybridize.distillation.run import distill
from hybridize.model.convert import convert
from hybridize.plan import ConversionPlan
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.schema import Recipe


def predicted_and_taken(
    recipe: Recipe,
    run: Path,
    *,
    plan: ConversionPlan,
    base: Path | None = None,
    seconds: float = SECONDS,
    offline: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Calibrates, distils in a new run folder, and compares.

    Args:
        run: a run folder; converted first where that has not been done.
        seconds: for the calibration's steps.

    Returns:
        `stages`, `total` and `peak`, each with `predicted`, `taken` and `ratio` (predicted / taken). Seconds of a stage
        count from the end of the one before to its last step; the total is that of the call of `distill`, which finds
        modules imported that the prediction counts (some seconds); the peak is in bytes, of a GPU's allocator or, on a
        CPU, of this whole process.

    Raises:
        What `calibrate`, `convert` and `distill` raise.
    """
    calibration = calibrate(recipe, plan, base=base, out=run, seconds=seconds, reporter=reporter)
    if not (run / "converted").exists():
        convert(plan, run / "converted", offline=offline, reporter=reporter)
    meter = meter_of(start_processes().device)
    meter.reset()
    begin = time.perf_counter()
    distill(recipe, run, plan=plan, base=base, offline=offline, reporter=reporter)
    taken_s = time.perf_counter() - begin
    rows = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
    return {
        "device": calibration.device,
        "stages": compare_stages(calibration, rows),
        "total": _compared(calibration.total_seconds, taken_s),
        "peak": _compared(calibration.peak_bytes, meter.peak_bytes()),
        "calibration_seconds": calibration.calibration_seconds,
        "first_steps_seconds": calibration.first_steps_seconds,
    }


def compare_stages(calibration: Calibration, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds by stage: predicted, and as the rows of metrics.jsonl have them, which sum up `seconds`."""
    ends = {row["stage"]: row["seconds"] for row in rows}  # the last of each stage stays
    found, before = {}, 0.0
    for stage in calibration.stages:
        found[stage.name] = _compared(stage.seconds, ends[stage.name] - before)
        before = ends[stage.name]
    return found


def _compared(predicted: float, taken: float) -> dict[str, float]:
    return {"predicted": predicted, "taken": taken, "ratio": predicted / taken}
