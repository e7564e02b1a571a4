"""A run that is killed anywhere, stopped or broken, and then started again, ends as one that was left alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize.checkpoint import FolderLock
from hybridize.distillation.data import Batch
from hybridize.distillation.teacher import Teacher
from hybridize.distillation.trainer import Trainer
from hybridize.errors import InterruptedError_, NumbersError, RecipeError, StoppedError, UsageError
from hybridize.model.convert import convert
from hybridize.plan import plan
from hybridize.recipe.schema import LayerPlan, MixerChoice
from tests.distillation import runs
from tests.distillation.runs import ROOT, Server, again, assert_same, rows

# The tiny run saves after each of its 7 steps and then writes the adapter: 8 folders. `align` uses each batch twice, so
# that the first save falls between two passes over one batch. Many other points: test_kill_points.py.
FAULTS = ("before-rename:kill:8", "step-start:kill:2", "during-rotation:kill:2")


@pytest.mark.parametrize("fault", FAULTS)
def test_killed_and_run_again(run: Path, reference: Path, serve: Server, fault: str) -> None:
    assert serve(run, fault) == -signal.SIGKILL
    assert_same(again(run), reference)
    left = sorted(path.name for path in (run / "distill").iterdir())
    assert left == ["adapter", "checkpoints", "metrics.jsonl", "settings.json"]
    checkpoints = sorted(path.name for path in (run / "distill" / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step-0000006", "step-0000007"]
    assert (run / "distill" / "checkpoints" / "latest").read_text() == "step-0000007\n"


def test_killed_many_times(run: Path, reference: Path, serve: Server) -> None:
    for fault in ("step-start:kill:2", "mid-accumulation:kill:1", "shard:kill:2", "after-save-before-latest:kill:1"):
        assert serve(run, fault) == -signal.SIGKILL
    assert serve(run, "") == 0
    assert_same(run / "distill", reference)


def batches_of(run: Path, patch: pytest.MonkeyPatch) -> dict[int, list[Batch]]:
    """Goes on with a run over short documents; the micro-batches of each step."""
    found: dict[int, list[Batch]] = {}
    step = Trainer._step

    def watched(self: Trainer, stage: Any, stage_step: int, how: Any, micros: Any, *args: Any) -> Any:
        found[self.progress.step + 1] = [micro.batch for micro in micros]
        return step(self, stage, stage_step, how, micros, *args)

    with patch.context() as inner:
        inner.setattr(Trainer, "_step", watched)
        again(run, "packed", save_every_steps=2)
    return found


@pytest.mark.parametrize("killed_in", [2, 3, 6])
def test_a_stream_of_documents_goes_on_at_the_exact_one(
    run: Path, serve: Server, monkeypatch: pytest.MonkeyPatch, killed_in: int
) -> None:
    straight = run.with_name(run.name + "-straight")
    shutil.copytree(run, straight)
    expected = batches_of(straight, monkeypatch)
    assert serve(run, f"step-start:kill:{killed_in}", "packed", save_every_steps=2) == -signal.SIGKILL
    found = batches_of(run, monkeypatch)
    saved = {2: 0, 3: 2, 6: 4}[killed_in]  # steps 2 and 4, and 3 where a stage ends
    assert sorted(found) == list(range(saved + 1, 8))
    for step, batches in found.items():
        assert [batch.documents for batch in batches] == [batch.documents for batch in expected[step]]
        for batch, wanted in zip(batches, expected[step], strict=True):
            assert torch.equal(batch.tokens, wanted.tokens)
            assert batch.bounds is not None, "short documents begin inside the rows"
            assert wanted.bounds is not None
            assert torch.equal(batch.bounds, wanted.bounds)
    assert_same(run / "distill", straight / "distill")


def test_full_disk_keeps_the_previous_checkpoint(run: Path, reference: Path, serve: Server) -> None:
    assert serve(run, "shard:ENOSPC:3") == 5
    assert_same(again(run), reference)


def signal_in_step(number: signal.Signals, wanted: int) -> Callable[..., Any]:
    """`Trainer._step`, with a signal while step `wanted` runs."""
    step = Trainer._step

    def step_with_signal(self: Trainer, *args: Any) -> Any:
        if self.progress.step + 1 == wanted:
            signal.raise_signal(number)
        return step(self, *args)

    return step_with_signal


def test_bfloat16_and_recomputation_resume_as_well(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"precision": "bfloat16", "gradient_checkpointing": True, "save_every_steps": 100}
    other = run.with_name(run.name + "-straight")
    shutil.copytree(run, other)
    straight = again(other, **changes)
    for wanted in (1, 5):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", signal_in_step(signal.SIGTERM, wanted))
            with pytest.raises(StoppedError):
                again(run, **changes)
    assert_same(again(run, **changes), straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops(
    run: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signal_in_step(number, 5))
        with pytest.raises(StoppedError, match="after step 5") as caught:
            again(run, save_every_steps=100)
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is handler
    assert rows(run / "distill")[-1]["step"] == 5
    assert_same(again(run), reference)


def test_signal_in_the_last_step_is_heard_after_the_adapter(
    run: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signal_in_step(signal.SIGTERM, 7))
        with pytest.raises(StoppedError, match=r"Stopped by SIGTERM; the training is complete\.") as caught:
            again(run)
    assert caught.value.exit_code == 75
    assert_same(run / "distill", reference)
    assert_same(again(run), reference)


def test_signal_before_the_first_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_with_signal(self: Trainer, stage: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_set_gradient_checkpointing", train_with_signal)
    with pytest.raises(InterruptedError_) as caught:
        again(run)
    assert caught.value.exit_code == 130
    assert not (run / "distill" / "checkpoints").exists()


def test_second_signal_ends_at_once() -> None:
    code = (
        "import os, signal, sys, time\n"
        "from hybridize.distillation.signals import stop_requests\n"
        "with stop_requests() as stop:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    assert stop and stop.signal is signal.SIGTERM\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    sys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == -signal.SIGTERM


def test_finished_run_is_left_alone(reference: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    again(reference.parent)
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before


def test_lost_adapter_comes_back_from_the_last_checkpoint(run: Path, reference: Path) -> None:
    found = again(run)
    shutil.rmtree(found / "adapter")
    assert_same(again(run), reference)


def test_damaged_newest_checkpoint_is_passed_over(run: Path, reference: Path, serve: Server) -> None:
    assert serve(run, "step-start:kill:6") == -signal.SIGKILL
    weights = run / "distill" / "checkpoints" / "step-0000005" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert_same(again(run), reference)


def test_save_and_log_settings_may_change(run: Path, reference: Path, serve: Server) -> None:
    assert serve(run, "step-start:kill:3") == -signal.SIGKILL
    assert_same(again(run, save_every_steps=5, keep_checkpoints=2), reference.parent / "distill")


def test_how_often_a_step_is_logged_changes_no_weight(run: Path) -> None:
    control = {"budget_tokens": 2, "budget_control": "l1", "l1_every_steps": 1}
    eviction = MixerChoice("token_eviction", {**runs.MIXERS["T"].options, **control})
    stages = (replace(runs.STAGES[0], steps=6, passes=1, accumulate=1),)
    adapters = []
    for log_every in (1, 5):
        recipe = replace(
            runs.tiny_recipe(run.parent, stages=stages, log_every_steps=log_every, save_every_steps=100),
            layers=LayerPlan(pattern="F T F T"),
            mixers={"T": eviction},
        )
        name = f"{run.name}-{log_every}"
        convert(plan(recipe, offline=True), run.parent / name / "converted")
        adapter = runs.distil(run.parent, recipe, name)
        adapters.append((adapter / "adapter_model.safetensors").read_bytes())
        assert rows(adapter.parent)[-1]["eviction_budget"] > 0
    assert adapters[0] == adapters[1]


def test_changed_recipe_is_refused(run: Path, serve: Server) -> None:
    assert serve(run, "step-start:kill:3") == -signal.SIGKILL
    stages = (runs.STAGES[0], replace(runs.STAGES[1], learning_rate=0.5))
    with pytest.raises(RecipeError) as caught:
        again(run, stages=stages)
    assert caught.value.problems == ("distill.stages.1.learning_rate: 0.01 → 0.5",)


def test_changed_data_is_refused(run: Path, serve: Server) -> None:
    assert serve(run, "step-start:kill:3") == -signal.SIGKILL
    text = run.parent / "text" / "3.txt"
    before = text.read_text()
    text.write_text(before.replace("3", "4"))
    try:
        with pytest.raises(RecipeError, match=r"data_files\.text/3\.txt"):
            again(run)
    finally:
        text.write_text(before)


def test_second_process_is_refused(run: Path) -> None:
    with FolderLock(run / "distill"), pytest.raises(UsageError, match="process"):
        again(run)


def break_layer(self: Teacher, batch: Batch, layers: Any) -> Any:
    traces = trace(self, batch, layers)
    traces[2].output[0, 3, 4] = float("nan")
    return traces


def break_hidden(self: Teacher, batch: Batch) -> torch.Tensor:
    return last_hidden(self, batch).index_fill(1, torch.tensor([3]), float("inf"))


trace, last_hidden = Teacher.trace, Teacher.last_hidden


@pytest.mark.parametrize(
    ("method", "broken", "says"),
    [
        ("trace", break_layer, ("Layer 2 is not finite", "stage align, step 1", "text/")),
        ("last_hidden", break_hidden, ("is not finite", "stage distill, step 1", "text/")),
    ],
)
def test_loss_that_is_not_finite(
    run: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, method: str, broken: Any, says: tuple[str, ...]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, method, broken)
        with pytest.raises(NumbersError) as caught:
            again(run)
    assert caught.value.exit_code == 6
    assert all(part in str(caught.value) for part in says)
    assert "distill/failure.json" in str(caught.value)
    text = (run / "distill" / "failure.json").read_text()
    failure = json.loads(text)
    assert (failure["stage"], failure["stage_step"]) == (says[1].split()[1][:-1], 1)
    assert failure["step"] == (1 if failure["stage"] == "align" else 4)
    assert failure["layer"] == (2 if failure["stage"] == "align" else None)  # in distill it is the teacher that errs
    assert "nan" in failure["losses"].values()
    assert failure["documents"]
    assert all(name.startswith("text/") for name in failure["documents"])
    assert failure["learning_rates"]["mixers"] == pytest.approx(5e-3 if failure["stage"] == "align" else 1e-2)
    assert {"python", "numpy", "torch"} <= set(failure["random_states"])
    assert all(len(digest) == 64 for digest in failure["random_states"].values())
    assert str(run.parent) not in text
    assert_same(again(run), reference)
    assert not (run / "distill" / "failure.json").exists()


def test_gradient_that_is_not_finite(run: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_optimizer = Trainer._optimizer

    def with_bad_gradient(self: Trainer, stage: Any, step: Any) -> torch.optim.Optimizer:
        if stage.kind == "distill":
            named = self.student.groups["adapters"]
            name = next(name for name in named if "layers.1." in name and "v_proj.lora_B" in name)
            named[name].register_hook(lambda gradient: gradient * float("inf"))
        return make_optimizer(self, stage, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimizer", with_bad_gradient)
        with pytest.raises(NumbersError, match=r"gradient of .*layers\.1\.self_attn\.v_proj\.lora_B") as caught:
            again(run)
    assert caught.value.where == "stage distill, step 1"
    failure = json.loads((run / "distill" / "failure.json").read_text())
    assert failure["parameter"].endswith("layers.1.self_attn.v_proj.lora_B.default.weight")
    assert_same(again(run), reference)


def test_first_bad_layer_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def with_bad_weight(self: Trainer, stage: Any, *args: Any) -> Any:
        if stage.kind == "distill":
            self.student.model.model.layers[1].mlp.down_proj.base_layer.weight.data.fill_(float("nan"))
        return step(self, stage, *args)

    monkeypatch.setattr(Trainer, "_step", with_bad_weight)
    with pytest.raises(NumbersError):
        again(run)
    assert json.loads((run / "distill" / "failure.json").read_text())["layer"] == 1
