"""The budget controller at work: trained scorers keep as many tokens a head as the budget says, and go on so."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from hybridize.distillation.data import Batch
from hybridize.distillation.gradients import clip
from hybridize.distillation.lora import Student, wrap
from hybridize.distillation.stages import make_step
from hybridize.distillation.teacher import Teacher
from hybridize.mixers.parts.budget_controller import BudgetController
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from hybridize.recipe.schema import Stage
from tests.distillation.runs import CHARACTERS
from tests.tiny import tiny_teacher

TEXT = Path(__file__).resolve().parents[2] / "recipes" / "text" / "train"
LR = 1e-2
BUDGET, TOKENS, SEQUENCES, NUM_BATCHES = 24, 128, 8, 2
EVICTION: dict[str, Any] = {
    "mixer": "token_eviction",
    "budget_control": "l1",
    "window_tokens": 12,
    "sink_tokens": 2,
    "budget_tokens": BUDGET,
    "scorer_dropout": 0.0,
    # The errors that align minimises are of order one, and so is what pushes against them.
    "l1_init": 1.0,
    "l1_max": 100.0,
    "l1_every_steps": 16,
}


def batches() -> list[Batch]:
    """Real text, a character a token."""
    ids = {character: index + 4 for index, character in enumerate(CHARACTERS)}
    text = next(iter(sorted(TEXT.glob("*.txt")))).read_text(encoding="utf-8")[1000:]
    tokens = torch.tensor([ids.get(character, 3) for character in text[: NUM_BATCHES * SEQUENCES * TOKENS]])
    return [Batch(part, ("text",)) for part in tokens.view(NUM_BATCHES, SEQUENCES, TOKENS)]


def kept_by_step(steps: int, **options: Any) -> torch.Tensor:
    """Trains the scorers of one layer alone; [steps, H] K over the budget."""
    layers = [config_from_dict({"mixer": "full_attention"}), config_from_dict(EVICTION | options)]
    student: Student = wrap(swap(tiny_teacher(num_hidden_layers=2), layers), None, frozen_dtype=torch.float32)
    stage = Stage("align", "align", steps=steps, passes=2)
    step = make_step(stage, student, Teacher(tiny_teacher(num_hidden_layers=2)), nullcontext())  # type: ignore[arg-type]
    groups = student.train_only(("mixers",))
    optimizer = torch.optim.AdamW(groups["mixers"].values(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    prepared = [step.prepare(batch) for batch in batches()]
    ((_, mixer),) = student.mixers
    student.model.train()
    mixer.schedule(1.0, TOKENS)
    found = []
    for number in range(steps):
        optimizer.zero_grad()
        step.backward(prepared[number % NUM_BATCHES], 1.0, measure=False)
        clip(step.clip_groups(), 1.0, lambda squares: squares)
        optimizer.step()
        mixer.after_step()
        found.append(mixer.new.controller.num_kept / BUDGET)  # type: ignore[union-attr]
    return torch.stack(found)


@pytest.mark.parametrize("l1_sharing", ["head", "layer"])
def test_kept_tokens_reach_the_budget_and_stay(l1_sharing: str) -> None:
    kept = kept_by_step(400, l1_sharing=l1_sharing)
    assert (kept[20] > 4).all(), "at first everything is kept"
    settled = kept[250:] if l1_sharing == "head" else kept[250:].mean(1, keepdim=True)
    assert ((settled - 1).abs() < 0.05).all(), (float(settled.min()), float(settled.max()))


@pytest.mark.parametrize("scorer_sharing", ["head", "layer"])
def test_a_threshold_brings_them_to_the_budget_without_a_loss(scorer_sharing: str) -> None:
    kept = kept_by_step(300, budget_control="threshold", scorer_sharing=scorer_sharing)
    settled = kept[200:] if scorer_sharing == "head" else kept[200:].mean(1, keepdim=True)
    assert ((settled - 1).abs() < 0.05).all(), (float(settled.min()), float(settled.max()))


@pytest.mark.parametrize("off", [0.3, 1.5, 5.0])
def test_swings_of_a_scorer_that_overreacts_die_out(off: float) -> None:
    made = BudgetController(config_from_dict(EVICTION), 1)  # type: ignore[arg-type]
    made.initialise()
    made.steps.fill_(100)
    made.l1_weight.fill_(1.0)
    # A scorer that answers at once: K falls with the tenth power of lambda, as measured near the budget.
    made.num_kept.fill_(off * BUDGET)
    found = []
    for _ in range(400):
        kept = BUDGET * off * made.l1_weight.pow(-10)
        made.observe(kept / TOKENS, TOKENS)
        made.after_step(BUDGET)
        found.append(float(made.num_kept) / BUDGET)
    assert all(abs(share - 1) < 0.05 for share in found[200:])


def test_kept_tokens_are_a_mean_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two controllers of one layer, each with the documents of its own process, stay equal."""
    made = [BudgetController(config_from_dict(EVICTION), 2) for _ in range(2)]  # type: ignore[arg-type]
    for each in made:
        each.initialise()
    seen = torch.tensor([[[0.5, 0.25], [0.75, 0.5]], [[0.1, 0.2], [0.3, 0.6]]])  # [steps, processes, H]
    for step, of_processes in enumerate(seen):
        for process, each in enumerate(made):
            other = torch.cat((of_processes[1 - process] * 100, torch.tensor([100.0])))
            with monkeypatch.context() as patch:
                patch.setattr(distributed, "is_initialized", lambda: True)
                patch.setattr(distributed, "get_world_size", lambda: 2)
                patch.setattr(distributed, "all_reduce", lambda sent, other=other: sent.add_(other))
                each.observe(of_processes[process], 100)
                each.after_step(BUDGET)
        assert torch.equal(made[0].num_kept, made[1].num_kept), step
    alone = BudgetController(config_from_dict(EVICTION), 2)  # type: ignore[arg-type]
    alone.initialise()
    for of_processes in seen:
        for share in of_processes:
            alone.observe(share, 100)
        alone.after_step(BUDGET)
    torch.testing.assert_close(made[0].num_kept, alone.num_kept)
