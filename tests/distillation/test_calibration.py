"""Calibration: which steps a run has, what they are scaled to, when the stopwatch stops, and what does not fit.

No test depends on how fast it runs: clocks are by arithmetic.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize.distillation import calibration, rehearsal
from hybridize.distillation.calibration import Request, calibrate, measure, random_pair, random_teacher
from hybridize.distillation.forecast import (
    Kind,
    Part,
    Rehearsed,
    forecast_part,
    parts_of,
    problem_of,
)
from hybridize.distillation.processes import start_processes
from hybridize.distillation.rehearsal import Rehearser, Size, ladder
from hybridize.distillation.schedule import Shape
from hybridize.distillation.stopwatch import Stopwatch
from hybridize.errors import RecipeError, ResourceError, UsageError
from hybridize.mixers.token_eviction import TokenEviction
from hybridize.plan import ConversionPlan, plan
from hybridize.progress import Silent, Task
from hybridize.recipe.schema import Curriculum, Data, Ramp, Recipe, Stage
from hybridize.recipe.sources import TextSource
from tests.distillation import runs

NEW, NEW_MEASURED, USED, USED_MEASURED = Kind(True, False), Kind(True, True), Kind(False, False), Kind(False, True)
DATA = Data(train=(TextSource("*.txt"),), sequence_tokens=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and texts."""
    path = tmp_path_factory.mktemp("calibration")
    runs.write_teacher(path)
    runs.write_texts(path)
    return path


# The stopwatch.


def watch_steps(watch: Stopwatch, now: list[float], steps: list[tuple[Kind, float]], behind: int = 0) -> int:
    """How many steps are begun before the watch asks for the end; their numbers are read `behind` steps later."""
    begun = 0
    for number, (kind, _) in enumerate(steps):
        if watch.stop:
            break
        watch.begin(kind)
        begun += 1
        if number >= behind:
            now[0] += steps[number - behind][1]
            watch.advance()
    return begun


def stopwatch(wanted: set[Kind], limit_s: float, settling: int = 1) -> tuple[Stopwatch, list[float]]:
    now = [100.0]
    return Stopwatch(wanted, limit_s, lambda: now[0], settling), now


@pytest.mark.parametrize("behind", [0, 1])
def test_stopwatch_keeps_the_first_step_apart_and_ends_when_stable(behind: int) -> None:
    watch, now = stopwatch({NEW}, 1000.0)
    begun = watch_steps(watch, now, [(NEW, 30.0), *[(NEW, 2.0)] * 50], behind)
    assert watch.first_s == 30
    assert watch.seconds == {NEW: [2.0] * 3}
    assert begun == 4 + behind


def test_stopwatch_keeps_more_steps_apart_where_more_are_unlike() -> None:
    watch, now = stopwatch({NEW}, 1000.0, settling=3)
    watch_steps(watch, now, [(NEW, 30.0), (NEW, 9.0), (NEW, 3.0), *[(NEW, 2.0)] * 50], behind=1)
    assert watch.first_s == 42
    assert watch.seconds == {NEW: [2.0] * 3}


def test_stopwatch_goes_on_while_times_scatter_and_ends_with_its_time() -> None:
    watch, now = stopwatch({NEW}, 20.0)
    watch_steps(watch, now, [(NEW, 30.0), *[(NEW, 1.0), (NEW, 2.0)] * 50])
    assert sum(watch.seconds[NEW]) == pytest.approx(20, abs=2)


def test_stopwatch_waits_for_every_kind() -> None:
    watch, now = stopwatch({NEW, USED_MEASURED}, 0.0)
    watch_steps(watch, now, [(NEW, 1.0), (NEW, 2.0), (USED, 3.0), (USED_MEASURED, 4.0), (NEW, 5.0)])
    assert watch.seconds == {NEW: [2.0], USED: [3.0], USED_MEASURED: [4.0]}


def test_ladder_goes_down_by_halves_micro_batches_first() -> None:
    sizes = ladder(Shape(3, 512), 4)
    assert sizes[::-1] == [
        Size(Shape(3, 512), 4),
        Size(Shape(3, 512), 2),
        Size(Shape(3, 512), 1),
        Size(Shape(1, 512), 1),
        Size(Shape(1, 256), 1),
        Size(Shape(1, 128), 1),
    ]
    assert ladder(Shape(1, 200), 1) == [Size(Shape(1, 200), 1)]


# Rehearsals of a tiny model, whose clock goes by tokens.

SECONDS_PER_TOKEN = 2.0**-7
STAGES = (
    Stage("align", "align", steps=50, accumulate=2, passes=3),
    Stage("distill", "distill", steps=40, batch_sequences=4, sequence_tokens=32, curriculum=Curriculum(16, 0.5)),
)


class Tries:
    """Notes what steps are run, lets their tokens pass as time, and has memory for so many tokens at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most_tokens: int = 10**9) -> None:
        self.now = 0.0
        self.sizes: list[tuple[str, Size]] = []
        monkeypatch.setattr(rehearsal, "SHORTEST_TOKENS", 16)
        step = rehearsal._Rehearsal._step

        def noted(trainer: Any, stage: Stage, stage_step: int, *args: Any) -> Any:
            size = Size(Shape(stage.batch_sequences, stage.sequence_tokens or 0), stage.accumulate)
            if size.shape.sequences * size.shape.tokens > most_tokens:
                raise torch.OutOfMemoryError("out of memory")
            self.sizes.append((stage.name, size))
            done = step(trainer, stage, stage_step, *args)
            self.now += size.tokens * SECONDS_PER_TOKEN
            return done

        monkeypatch.setattr(rehearsal._Rehearsal, "_step", noted)


@pytest.fixture
def rehearse(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Rehearses the parts of STAGES, each for so many seconds: parts, what they took, and who did it."""

    def call(
        tries: Tries, limit_s: float, only: int | None = None, **changes: Any
    ) -> tuple[list[tuple[Part, Rehearsed]], Rehearser]:
        recipe = runs.tiny_recipe(folder, **({"stages": STAGES} | changes))
        assert recipe.distill is not None
        assert recipe.data is not None
        made, cpu = plan(recipe, offline=True), torch.device("cpu")
        pair = random_pair(random_teacher(made, cpu, torch.float32), made, recipe.distill, cpu)
        request = Request(recipe.distill, recipe.data, made, folder, tmp_path, 1.0, time.time())
        found = Rehearser(
            recipe.distill,
            recipe.data,
            pair,
            calibration.sequences_for(request)[0],
            start_processes(),
            mixed=False,
            seed=0,
            folder=tmp_path,
            clock=lambda: tries.now,
        )
        parts = parts_of(recipe.distill, recipe.data)
        return [(one, found.rehearse(one, limit_s)) for one in (parts if only is None else (parts[only],))], found

    return call


def test_every_shape_is_rehearsed_as_it_is_where_there_is_time(
    rehearse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = Tries(monkeypatch)
    found, rehearser = rehearse(tries, 1000.0)
    assert [(part.stage.name, part.shape) for part, _ in found] == [
        ("align", Shape(1, 32)),
        ("distill", Shape(8, 16)),
        ("distill", Shape(4, 32)),
    ]
    for part_, result in found:
        forecast = forecast_part(part_, result, 1e15)
        assert not forecast.extrapolated
        assert forecast.fits
        assert forecast.seconds_per_step == pytest.approx(part_.step_tokens * SECONDS_PER_TOKEN)
        assert {kind.measures for kind in result.seconds} == {True, False}
        assert result.peak_bytes >= result.fixed_bytes > 0
    assert set(found[0][1].seconds) == {NEW, USED, USED_MEASURED}
    # A checkpoint within a stage holds weights and two moments of everything that the stage trains.
    trained = rehearser.student.trained()
    assert rehearser.savings.keys() == {"align", "distill"}
    assert rehearser.savings["distill"].bytes > 12 * sum(p.numel() for p in trained.values())
    assert rehearser.savings["align"].bytes < rehearser.savings["distill"].bytes


def test_slow_shapes_are_rehearsed_smaller(rehearse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tries = Tries(monkeypatch)
    ((slow, result),), rehearser = rehearse(tries, 3.0, only=1)
    forecast = forecast_part(slow, result, 1e15)
    assert forecast.extrapolated
    assert forecast.seconds_per_step == pytest.approx(slow.step_tokens * SECONDS_PER_TOKEN)
    assert max(size.tokens for name, size in tries.sizes if name == "distill") < 128
    assert rehearser.spent_s <= 3.0 + 3 * SECONDS_PER_TOKEN * result.shape.sequences * result.shape.tokens
    assert tries.now > rehearser.spent_s


@pytest.mark.parametrize(("most_tokens", "fits"), [(64, Shape(2, 32)), (31, Shape(1, 16))])
def test_what_runs_out_of_memory_is_halved_until_it_fits(
    rehearse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, most_tokens: int, fits: Shape
) -> None:
    tries = Tries(monkeypatch, most_tokens)
    found, rehearser = rehearse(tries, 1000.0, only=-1, gradient_checkpointing=False)
    ((last, result),) = found
    assert result.shape == fits
    assert result.too_large is not None
    forecast = forecast_part(last, result, 1e15)
    assert not forecast.fits
    assert f"{fits.sequences} x {fits.tokens} fit. Set gradient_checkpointing: true, or" in problem_of(
        last, forecast, 1e15, recomputes=False
    )
    assert all(parameter.grad is None for parameter in rehearser.student.trained().values())
    assert all(mixer.auxiliary == {} for _, mixer in rehearser.student.mixers)


def test_memory_that_does_not_grow_is_told_by_two_sizes() -> None:
    found = Rehearsed(Shape(2, 64), 1, {}, 0.0, peak_bytes=1500.0, fixed_bytes=1400.0)
    assert rehearsal._fixed_bytes(found, [(32, 750.0), (64, 1100.0)]) == 500  # 250 and 1000 of tokens
    assert rehearsal._fixed_bytes(found, [(128, 1490.0)]) == 1400
    assert rehearsal._fixed_bytes(found, [(32, 1600.0)]) == 1400
    assert rehearsal._fixed_bytes(found, []) == 1400


@pytest.mark.parametrize("ramping", [True, False])
def test_budget_moves_where_it_does_in_the_run(
    rehearse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, ramping: bool
) -> None:
    told: list[float] = []
    monkeypatch.setattr(TokenEviction, "schedule", lambda mixer, progress, tokens: told.append(progress))
    stages = (Stage("s", "distill", steps=40, budget_ramp=Ramp(0.0, 0.5)),)
    rehearse(Tries(monkeypatch), 1000.0, only=int(ramping), stages=stages)
    in_steps = told[:-2]  # then the final setting, in two layers
    assert len(set(in_steps)) == (2 if ramping else 1)


def test_what_fits_in_no_size_ends_with_a_sentence(
    rehearse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match="stage distill: Not even 1 x 16 tokens fit") as caught:
        rehearse(Tries(monkeypatch, 15), 1000.0, only=-1)
    assert caught.value.exit_code == 5


def test_other_errors_are_not_taken_for_memory(rehearse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(rehearsal._Rehearsal, "_backward", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        rehearse(Tries(monkeypatch), 1.0, only=-1)


# The whole.


def request_of(recipe: Recipe, made: ConversionPlan, base: Path, folder: Path) -> Request:
    assert recipe.distill is not None
    assert recipe.data is not None
    return Request(recipe.distill, recipe.data, made, base, folder, 0.2, time.time())


def test_teacher_weights_are_shared_where_a_run_shares_them(folder: Path) -> None:
    recipe, cpu = runs.tiny_recipe(folder), torch.device("cpu")
    assert recipe.distill is not None
    made = plan(recipe, offline=True)
    for share in (True, False):
        model = random_teacher(made, cpu, torch.float32)
        student, teacher = random_pair(model, made, replace(recipe.distill, share_weights=share), cpu)
        own = {p.data_ptr() for p in student.peft.parameters()}
        both = [name for name, p in teacher.model.named_parameters() if p.data_ptr() in own]
        assert bool(both) == share
        trained = {p.data_ptr() for p in student.trained().values()}
        assert not trained & {p.data_ptr() for p in teacher.model.parameters()}
        if share:
            assert set(both) == {name for name, _ in teacher.model.named_parameters()}


def test_measured_calibration_adds_up(folder: Path, tmp_path: Path) -> None:
    recipe = runs.tiny_recipe(folder)
    made, told = plan(recipe, offline=True), []
    found = measure(request_of(recipe, made, folder, tmp_path), told.append)
    assert told == ["align, 1 x 32 tokens", "distill, 2 x 32 tokens", "distill, 2 x 32 tokens, moving budget"]
    assert found.tokens == "of the recipe's texts"
    assert [stage.steps for stage in found.stages] == [3, 4]
    values = json.loads(json.dumps(found.to_json()))
    stages_s = sum(stage["seconds"] for stage in values["stages"])  # their checkpoints included
    assert values["total_seconds"] == pytest.approx(values["start_seconds"] + stages_s + values["end_seconds"])
    assert all(stage["seconds"] > stage["saving_seconds"] > 0 for stage in values["stages"])
    assert values["peak_bytes"] == max(stage["peak_bytes"] for stage in values["stages"])
    assert values["problems"] == []
    assert values["disk_bytes"] > 3 * 12 * made.bill.trained_parameters  # two checkpoints are kept, one is on its way


@pytest.mark.parametrize(
    "data", [TextSource("org/texts", format="hub"), TextSource("nowhere/*.txt")], ids=["hub", "none"]
)
def test_without_texts_tokens_are_random(folder: Path, tmp_path: Path, data: TextSource) -> None:
    recipe = runs.tiny_recipe(folder)
    recipe = replace(recipe, data=Data(train=(data,), sequence_tokens=32))
    sequences, told = calibration.sequences_for(request_of(recipe, plan(recipe, offline=True), folder, tmp_path))
    assert told.startswith("by chance, one text a row: ")
    first, second = sequences.next_batch(2, 500), sequences.next_batch(2, 500)
    assert first.tokens.shape == (2, 500)
    assert first.bounds is None
    assert not torch.equal(first.tokens, second.tokens)
    assert int(first.tokens.max()) < 96


def test_recipe_without_stages_is_refused(folder: Path) -> None:
    recipe = runs.tiny_recipe(folder)
    made = plan(recipe, offline=True)
    with pytest.raises(RecipeError, match="no `distill`"):
        calibrate(replace(recipe, distill=None), made)


def test_several_processes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = runs.tiny_recipe(folder)
    with pytest.raises(UsageError, match="without a launcher"):
        calibrate(recipe, plan(recipe, offline=True))


class Listener(Silent):
    """Notes the steps of a task."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, str]] = []

    @contextmanager
    def task(self, description: str, total: float | None) -> Iterator[Task]:
        yield self  # type: ignore[misc]

    def advance(self, steps: float = 1, **fields: str) -> None:
        self.steps.append((steps, fields.get("step", "")))


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"exit status -9 at: align, 1 x 32 tokens"),
        (
            lambda: (_ for _ in ()).throw(ResourceError("The disk is full.", hint="Buy one.")),
            "The disk is full. Buy one.",
        ),
        (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("x")), "not enough memory for the model itself"),
    ],
    ids=["killed", "told", "out of memory"],
)
def test_end_of_the_child_is_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[], Any], message: str
) -> None:
    def fails(request: Request, tell: Callable[[str], None]) -> Any:
        tell("align, 1 x 32 tokens")
        end()

    fork = multiprocessing.get_context("fork")  # this process is known to the child, the patch included
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(calibration, "measure", fails)
    recipe, listener = runs.tiny_recipe(folder), Listener()
    with pytest.raises(ResourceError, match=message):
        calibrate(recipe, plan(recipe, offline=True), base=folder, out=folder / "run", reporter=listener)
    assert listener.steps == [(0, "align, 1 x 32 tokens")]
    assert not list(folder.glob("hybridize-calibration-*"))
