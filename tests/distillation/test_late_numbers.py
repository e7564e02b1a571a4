"""Numbers that are read a step late, as those of a GPU are: what is written, saved and reported does not change."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize.checkpoint import load_state, resolve_source
from hybridize.distillation.data import Batch
from hybridize.distillation.late_numbers import Arrived, LateNumbers
from hybridize.distillation.teacher import Teacher
from hybridize.distillation.trainer import Trainer
from hybridize.errors import NumbersError, StoppedError
from tests.distillation.runs import Server, again, assert_same, rows

CPU = torch.device("cpu")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that keeps its numbers for a step, as a GPU does."""
    make = LateNumbers.__init__

    def make_late(self: LateNumbers[Any], device: torch.device) -> None:
        make(self, device)
        self._behind = 1

    monkeypatch.setattr(LateNumbers, "__init__", make_late)


def pairs(found: list[Arrived[Any]]) -> list[tuple[Any, dict[str, float]]]:
    return [(arrived.note, arrived.numbers) for arrived in found]


def test_on_a_cpu_numbers_are_read_at_once() -> None:
    numbers: LateNumbers[str] = LateNumbers(CPU)
    assert numbers.read() == []
    numbers.put("a", {"x": torch.tensor(0.5), "y": torch.tensor(2)})
    assert pairs(numbers.read()) == [("a", {"x": 0.5, "y": 2.0})]
    assert numbers.read(everything=True) == []


@pytest.mark.usefixtures("late")
def test_late_numbers_come_in_order_and_are_those_of_their_step() -> None:
    numbers: LateNumbers[int] = LateNumbers(CPU)
    flag, found = torch.zeros(()), []
    for step in range(4):
        flag.fill_(step)  # one tensor that every step writes
        numbers.put(step, {"flag": flag})
        found += pairs(numbers.read())
        assert [note for note, _ in found] == list(range(step))
    found += pairs(numbers.read(everything=True))
    assert found == [(step, {"flag": float(step)}) for step in range(4)]


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    device = torch.device("cuda")
    numbers: LateNumbers[int] = LateNumbers(device)
    weight = torch.randn(4096, 4096, device=device)
    steps = [torch.tensor(step, device=device) for step in range(2)]

    def queue(step: int, count: int) -> None:
        product = weight
        for _ in range(count):
            product = torch.nn.functional.normalize(product @ weight)
        numbers.put(step, {"x": product.square().sum(), "step": steps[step]})

    for step in range(2):  # the first pinned memory is waited for, and so are kernels that are loaded
        queue(step, 1)
    assert len(numbers.read(everything=True)) == 2
    torch.cuda.synchronize()
    for step in range(2):
        queue(step, 100)
        last = torch.cuda.Event()
        last.record()
        found = numbers.read()
        assert not last.query(), "the step that was just queued is still being computed"
        assert [arrived.note for arrived in found] == [0] * step
    ((note, named),) = pairs(numbers.read(everything=True))
    assert note == 1
    assert named["step"] == 1.0
    assert named["x"] == pytest.approx(4096.0, rel=1e-4)  # rows of length one


@pytest.mark.gpu
def test_a_step_takes_what_the_gpu_took_whenever_the_host_looks() -> None:
    device = torch.device("cuda")
    numbers: LateNumbers[int] = LateNumbers(device)
    weight = torch.randn(4096, 4096, device=device)
    for count in (1, 1, 20, 80):
        product = weight
        for _ in range(count):
            product = torch.nn.functional.normalize(product @ weight)
        numbers.put(count, {"x": product.sum()})
    torch.cuda.synchronize()
    time.sleep(0.5)
    found = {arrived.note: arrived.seconds for arrived in numbers.read(everything=True)}
    assert found[80] == pytest.approx(4 * found[20], rel=0.3)
    assert found[80] < 0.5


# The trainer, when the numbers come late.


@pytest.mark.usefixtures("late")
def test_the_same_run(run: Path, reference: Path) -> None:
    assert_same(again(run, save_every_steps=3), reference)


@pytest.mark.usefixtures("late")
def test_the_same_run_after_kills_and_a_signal(
    run: Path, reference: Path, serve: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve(run, "step-start:kill:2") == -signal.SIGKILL
    step = Trainer._step

    def with_signal(self: Trainer, *args: Any) -> Any:
        if self.progress.step + 1 == 5:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", with_signal)
        with pytest.raises(StoppedError, match="after step 5"):
            again(run, save_every_steps=100)
    assert [row["step"] for row in rows(run / "distill")] == [1, 2, 3, 4, 5]
    assert serve(run, "mid-accumulation:kill:2", save_every_steps=100) == -signal.SIGKILL
    assert_same(again(run), reference)


Break = Callable[[pytest.MonkeyPatch, int], None]


def break_teacher(patch: pytest.MonkeyPatch, wanted: int) -> None:
    """The teacher's last hidden state is NaN in one step of `distill` (its micro-batches are two a step)."""
    last_hidden, calls = Teacher.last_hidden, iter(range(100))

    def broken(self: Teacher, batch: Batch) -> torch.Tensor:
        found = last_hidden(self, batch)
        return found * float("nan") if next(calls) // 2 + 4 == wanted else found

    patch.setattr(Teacher, "last_hidden", broken)


def break_gradient(patch: pytest.MonkeyPatch, wanted: int) -> None:
    """A gradient is infinite in one step, all losses are finite."""
    step = Trainer._step

    def broken(self: Trainer, *args: Any) -> Any:
        handle = None
        if self.progress.step + 1 == wanted:
            named = self.student.groups["adapters"].items()
            adapter = next(p for name, p in named if "layers.1." in name and "v_proj.lora_B" in name)
            handle = adapter.register_hook(lambda gradient: gradient * float("inf"))
        try:
            return step(self, *args)
        finally:
            if handle is not None:
                handle.remove()

    patch.setattr(Trainer, "_step", broken)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("break_run", [break_teacher, break_gradient])
@pytest.mark.parametrize("save_every_steps", [2, 100])
def test_a_step_that_goes_wrong_changes_and_saves_nothing(
    run: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, break_run: Break, save_every_steps: int
) -> None:
    wanted = 6
    before: dict[int, dict[str, torch.Tensor]] = {}
    batches: dict[int, list[Batch]] = {}
    trainers: list[Trainer] = []
    with monkeypatch.context() as patch:
        break_run(patch, wanted)
        step = Trainer._step

        def watched(self: Trainer, stage: Any, stage_step: int, how: Any, micros: Any, optimizer: Any) -> Any:
            trainers[:] = [self]
            batches[self.progress.step + 1] = [micro.batch for micro in micros]
            before[self.progress.step + 1] = {n: p.detach().clone() for n, p in self.student.trained().items()}
            return step(self, stage, stage_step, how, micros, optimizer)

        patch.setattr(Trainer, "_step", watched)
        with pytest.raises(NumbersError) as caught:
            again(run, save_every_steps=save_every_steps)
    # The next step had begun before the numbers of the bad one were read, unless there was something to save.
    assert max(before) == (7 if save_every_steps == 100 else 6)
    after = trainers[0].student.trained()
    assert all(torch.equal(after[name], weight) for name, weight in before[wanted].items())
    assert any(not torch.equal(before[wanted][name], weight) for name, weight in before[wanted - 1].items())
    assert all(weight.isfinite().all() for weight in after.values())

    assert caught.value.where == "stage distill, step 3"
    failure = json.loads((run / "distill" / "failure.json").read_text())
    assert (failure["stage"], failure["stage_step"], failure["step"]) == ("distill", 3, wanted)
    assert failure["documents"] == list(dict.fromkeys(name for batch in batches[wanted] for name in batch.documents))
    if break_run is break_gradient:
        assert failure["parameter"].endswith("layers.1.self_attn.v_proj.lora_B.default.weight")
    else:
        assert "nan" in failure["losses"].values()
        assert not any(name.startswith("mixer_") for name in failure["losses"])
    assert [row["step"] for row in rows(run / "distill")] == [1, 2, 3, 4, 5]
    saved = sorted(path.name for path in (run / "distill" / "checkpoints").iterdir())
    assert saved == ["latest", *(["step-0000003", "step-0000004"] if save_every_steps == 2 else ["step-0000003"])]
    newest = load_state(resolve_source(str(run / "distill" / "checkpoints" / saved[-1])))
    assert all(tensor.isfinite().all() for tensor in newest.values() if tensor.is_floating_point())
    assert_same(again(run), reference)


@pytest.mark.usefixtures("late")
def test_the_layer_of_a_bad_weight_is_named_although_the_next_step_has_begun(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def with_bad_weight(self: Trainer, *args: Any) -> Any:
        if self.progress.step + 1 == 5:
            self.student.model.model.layers[1].mlp.down_proj.base_layer.weight.data.fill_(float("nan"))
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_step", with_bad_weight)
    with pytest.raises(NumbersError):
        again(run, save_every_steps=100)
    failure = json.loads((run / "distill" / "failure.json").read_text())
    assert (failure["step"], failure["layer"]) == (5, 1)


@pytest.mark.usefixtures("late")
def test_rows_do_not_depend_on_where_a_run_saves(run: Path) -> None:
    other = run.with_name(run.name + "-other")
    shutil.copytree(run, other)
    often, seldom = (again(folder, save_every_steps=every) for folder, every in ((run, 1), (other, 100)))
    assert rows(often) == rows(seldom)
