from __future__ import annotations

from typing import Any

import pytest

from hybridize.evaluation.speed import speed
from hybridize.inference.bench import measure as measure_module
from hybridize.progress import SILENT
from hybridize.recipe.probes import SpeedProbe


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every piece of work takes a second more than the one before: 1, 2, 3, ..."""
    taken: list[float] = []

    def seconds_of(work: Any, device: Any) -> float:
        work()
        taken.append(len(taken) + 1.0)
        return taken[-1]

    monkeypatch.setattr(measure_module, "seconds_of", seconds_of)
    return taken


def test_times_are_the_median_after_a_warm_up(teacher: Any, clock: list[float]) -> None:
    settings = SpeedProbe(lengths=(20,), batch_sequences=(2,), new_tokens=4, repeats=3)
    with SILENT.task("", None) as task:
        row = speed({"student": teacher}, settings, seed=0, task=task)
    # The first pass of either kind warms up: reading takes 2, 3 and 4 s, then four steps 6, 7 and 8 s.
    assert row["prefill"] == [{"tokens": 20, "sequences": 2, "student": 40 / 3, "teacher": None}]
    (decode,) = row["decode"]
    assert (decode["tokens"], decode["sequences"], decode["student"], decode["teacher"]) == (20, 2, 1000 * 7 / 4, None)
    assert decode["student_state_bytes"] > 0
    assert decode["teacher_state_bytes"] is None


def test_every_size_is_timed_for_every_model(teacher: Any, other: Any) -> None:
    settings = SpeedProbe(lengths=(8, 16), batch_sequences=(1, 3), new_tokens=2, repeats=1, prefill_limit_tokens=24)
    with SILENT.task("", None) as task:
        row = speed({"student": other, "teacher": teacher}, settings, seed=0, task=task)
    assert [(r["tokens"], r["sequences"]) for r in row["decode"]] == [(8, 1), (8, 3), (16, 1), (16, 3)]
    assert [(r["tokens"], r["sequences"]) for r in row["prefill"]] == [(8, 1), (8, 3), (16, 1)]
    assert all(r[name] > 0 for part in ("prefill", "decode") for r in row[part] for name in ("student", "teacher"))


def test_the_models_are_afterwards_what_they_were(teacher: Any) -> None:
    settings = SpeedProbe(lengths=(8,), new_tokens=2, repeats=1)
    with SILENT.task("", None) as task:
        speed({"student": teacher}, settings, seed=0, task=task)
    assert not any("forward" in vars(module) for module in teacher.modules())
