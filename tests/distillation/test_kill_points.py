"""Fifty interruptions at seeded places of tiny runs: killed, out of disk, stopped; each ends as if left alone."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import pytest

from tests.distillation import runs
from tests.distillation.runs import Server, assert_same, rows

SEEDS = range(10)
INTERRUPTIONS = 5
"""Of each seed's run, one after the other."""
RECIPES = ("tiny", "packed")

FAULT_POINTS = (
    "step-start",
    "mid-accumulation",
    "shard",
    "before-manifest",
    "before-rename",
    "after-rename",
    "after-save-before-latest",
    "during-rotation",
)
LATEST = 3
"""At most so many passes through a point until it strikes; a run that goes on counts anew, and so all are met."""
WRITES = ("shard", "before-manifest", "before-rename")
"""Points at which a full disk makes itself felt."""
RESOURCE, STOPPED, INTERRUPTED = 5, 75, 130


@dataclass(frozen=True)
class Point:
    """Where a run is interrupted: at a fault point, or by a signal after a share of its time."""

    kind: str
    fault: str = ""
    time_share: float = 0.0

    @property
    def statuses(self) -> tuple[int, ...]:
        """Exit statuses of a run that was interrupted there."""
        if self.kind == "ENOSPC":
            return (RESOURCE,)
        if self.kind == "SIGTERM":  # before the first step nothing is saved; before that nobody listens
            return (STOPPED, INTERRUPTED, -signal.SIGTERM)
        return (-signal.SIGKILL,)


def points(seed: int) -> Iterator[Point]:
    """Endless."""
    draw = random.Random(seed)
    while True:
        kind = draw.choice(("kill", "kill", "kill", "ENOSPC", "SIGKILL", "SIGTERM"))
        if kind.startswith("SIG"):
            yield Point(kind, time_share=draw.random())
            continue
        name = draw.choice(WRITES if kind == "ENOSPC" else FAULT_POINTS)
        yield Point(kind, f"{name}:{kind}:{draw.randint(1, LATEST)}")


@dataclass(frozen=True)
class Straight:
    """A run that is left alone: what it trained, and how long it takes."""

    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def straight(prepared: Path, serve: Server) -> dict[str, Straight]:
    """By recipe."""
    found = {}
    for recipe in RECIPES:
        run = prepared / f"straight-{recipe}"
        shutil.copytree(prepared / "run", run)
        started = time.perf_counter()
        assert serve(run, recipe=recipe) == 0
        found[recipe] = Straight(run / "distill", time.perf_counter() - started)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_interrupted_anywhere(prepared: Path, straight: dict[str, Straight], serve: Server, seed: int) -> None:
    recipe, save_every_steps = RECIPES[seed % 2], (1, 3)[seed // 2 % 2]
    expected = straight[recipe]
    left = points(seed)
    attempt = count = 0
    while count < INTERRUPTIONS:
        run = prepared / f"seed-{seed}-{attempt}"
        attempt += 1
        shutil.copytree(prepared / "run", run)
        status = None
        while count < INTERRUPTIONS and status != 0:
            point = next(left)
            if point.fault:
                status = serve(run, point.fault, recipe, save_every_steps=save_every_steps)
            else:
                number, after_s = signal.Signals[point.kind], point.time_share * expected.seconds
                status = serve.signalled(run, number, after_s, recipe, save_every_steps=save_every_steps)
            assert status in (0, *point.statuses), point
            count += status != 0  # else the run was through before it came to the point
        if status != 0:
            assert serve(run, recipe=recipe, save_every_steps=save_every_steps) == 0
        assert_same(run / "distill", expected.folder)
        kept = sorted(path.name for path in (run / "distill").iterdir())
        assert kept == ["adapter", "checkpoints", "metrics.jsonl", "settings.json"]
        checkpoints = run / "distill" / "checkpoints"
        assert (checkpoints / "step-0000007" / "manifest.json").is_file()
        assert (checkpoints / "latest").read_text() == "step-0000007\n"


def test_the_points_are_of_every_kind() -> None:
    drawn = [point for seed in SEEDS for point in islice(points(seed), INTERRUPTIONS)]
    assert {point.kind for point in drawn} == {"kill", "ENOSPC", "SIGKILL", "SIGTERM"}
    assert {point.fault.partition(":")[0] for point in drawn if point.kind == "kill"} == set(FAULT_POINTS)


def test_the_packed_run_has_what_a_resumed_one_must_find_again(straight: dict[str, Straight], prepared: Path) -> None:
    stages = runs.packed_recipe(prepared).distill.stages  # type: ignore[union-attr]
    assert stages[0].passes == 2
    assert all(stage.accumulate == 2 for stage in stages)
    assert stages[1].budget_ramp is not None
    tokens = [row["tokens"] for row in rows(straight["packed"].folder)]
    assert [after - before for before, after in pairwise(tokens)] == [0, 64, 64, 64, 64, 64]
