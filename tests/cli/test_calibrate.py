"""`hybridize plan --calibrate`, once as a whole, and what people see of it."""

from __future__ import annotations

import json
from pathlib import Path

from hybridize.cli.plan_view import calibration_parts
from tests.cli.conftest import Invoke

BLOCK = {
    "device": "a GPU",
    "versions": {"torch": "2.11.0", "peft": "0.19"},
    "calibration_seconds": 61.0,
    "tokens": "of the recipe's texts",
    "stages": [
        {
            "name": "align",
            "saving_seconds": 4.0,
            "shapes": [
                {
                    "shape": {"sequences": 8, "tokens": 1024},
                    "accumulate": 2,
                    "ramping": True,
                    "steps": 100,
                    "seconds_per_step": 0.6,
                    "tokens_per_s": 27306.7,
                    "peak_bytes": 3 * 2**30,
                    "extrapolated": True,
                }
            ],
        }
    ],
    "start_seconds": 20.0,
    "end_seconds": 1.0,
    "total_seconds": 85.0,
    "peak_bytes": 3 * 2**30,
    "capacity_bytes": 2**33,
    "disk_bytes": 2**20,
    "problems": ["it is small."],
}


def test_people_see_rows_and_sums() -> None:
    assert [str(part) for part in calibration_parts(BLOCK)] == [
        "distillation on a GPU (torch 2.11.0, peft 0.19)",
        "  stage         steps  sequences x tokens  s/step  tokens/s  time     memory",
        "  align (ramp)    100       8 x 1,024 x 2     0.6    27,307  1:00  3.0 GiB *",
        "  * rehearsed with fewer tokens, and scaled in proportion",
        "time         1:25 in all, of it 0:20 to start and 0:05 to save",
        "memory       3.0 GiB of 8.0 GiB at the peak",
        "disk         1.0 MiB for checkpoints and adapter",
        "rehearsed    in 1:01, with tokens of the recipe's texts",
        "problem      it is small.",
    ]


def test_plan_calibrates_in_a_process_of_its_own(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = invoke("plan", recipe, "--calibrate", "--calibrate-seconds", 0.1, "--out", out, "--json", "-q")
    assert result.code == 0, result.err
    assert result.err == ""
    values = result.json["plan"]
    assert json.loads(out.read_text()) == values
    block = values["calibration"]
    assert [stage["name"] for stage in block["stages"]] == ["align", "distill"]
    assert block["stages"][0]["shapes"][0]["shape"] == {"sequences": 1, "tokens": 32}
    assert block["total_seconds"] > block["start_seconds"] > 0
    assert block["peak_bytes"] > 0
    assert block["problems"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert len(calibration_parts(block)) > 6


def test_plan_needs_the_folder_of_its_output(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    result = invoke("plan", recipe, "--calibrate", "--out", tmp_path / "none" / "plan.json")
    assert result.code == 2
    assert "no such folder" in result.err


def test_plan_without_stages_cannot_be_calibrated(invoke: Invoke, recipe: Path) -> None:
    result = invoke("plan", recipe, "--calibrate", "--set", "distill=null")
    assert result.code == 3
    assert "no `distill`" in result.err
