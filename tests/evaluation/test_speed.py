from __future__ import annotations

from typing import Any

import pytest

from hybridize.evaluation import speed as speed_module
from hybridize.evaluation.speed import speed
from hybridize.progress import SILENT
from hybridize.recipe.probes import SpeedProbe


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds it a second later, and a second more each time: 1, 3, 6, 10, ..."""
    state = {"now": 0.0, "step": 0.0}

    def now(model: Any) -> float:
        state["step"] += 1
        state["now"] += state["step"]
        return state["now"]

    monkeypatch.setattr(speed_module, "_now", now)


def test_times_are_the_median_after_a_warm_up(teacher: Any, clock: None) -> None:
    settings = SpeedProbe(lengths=(20,), batch_sequences=(2,), new_tokens=4, repeats=3)
    with SILENT.task("", None) as task:
        row = speed({"student": teacher}, settings, seed=0, task=task)
    # Looks 1-3 warm up; those of the repeats are 4-6, 7-9, 10-12: reading takes 5, 8, 11 s and writing 6, 9, 12 s.
    assert row["prefill"] == [{"tokens": 20, "sequences": 2, "student": 40 / 8, "teacher": None}]
    assert row["decode"] == [{"tokens": 20, "sequences": 2, "student": 1000 * 9 / 4, "teacher": None}]


def test_every_size_is_timed_for_every_model(teacher: Any, other: Any) -> None:
    settings = SpeedProbe(lengths=(8, 16), batch_sequences=(1, 3), new_tokens=2, repeats=1)
    with SILENT.task("", None) as task:
        row = speed({"student": other, "teacher": teacher}, settings, seed=0, task=task)
    assert [(r["tokens"], r["sequences"]) for r in row["decode"]] == [(8, 1), (8, 3), (16, 1), (16, 3)]
    assert all(r[name] > 0 for part in ("prefill", "decode") for r in row[part] for name in ("student", "teacher"))
