"""A micro-batch that is replayed gives what one that is queued gives, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridize.distillation.data import Batch
from hybridize.distillation.lora import Student, wrap
from hybridize.distillation.recorded import BOUNDS_STEP, QUEUED_FIRST, RecordedDistil, padded_bounds, recorded
from hybridize.distillation.run import prepare_pair
from hybridize.distillation.stages import make_step
from hybridize.distillation.teacher import Teacher
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from hybridize.recipe.schema import Lora, Loss, Stage
from tests.tiny import tiny_teacher

LAYERS: tuple[dict[str, Any], ...] = (
    {"mixer": "token_eviction", "window_tokens": 48, "sink_tokens": 2, "budget_tokens": 24},
    {"mixer": "gated_delta_net", "short_convolution": 4},
    {"mixer": "full_attention"},
    {"mixer": "sliding_window", "window_tokens": 40},
)
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 192,
}


def test_bounds_are_padded_with_empty_documents() -> None:
    assert padded_bounds(None) is None
    bounds = padded_bounds(torch.tensor([0, 3, 9], dtype=torch.int32))
    assert bounds is not None
    assert bounds.tolist() == [0, 3, *[9] * (BOUNDS_STEP - 1)]
    whole = torch.arange(BOUNDS_STEP + 1, dtype=torch.int32)
    assert padded_bounds(whole) is whole


def test_a_cpu_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair("cpu")
    step = make_step(STAGE, student, teacher, torch.autocast("cpu", dtype=torch.bfloat16))
    assert recorded(step, student, 256, torch.device("cpu"), print) is step


STAGE = Stage("d", "distill", steps=8, loss=Loss(cross_entropy=0.1))


def pair(device: str) -> tuple[Student, Teacher]:
    configs = [config_from_dict(layer) for layer in LAYERS]
    torch.manual_seed(0)
    student = wrap(swap(tiny_teacher(**SIZES).bfloat16(), configs), Lora(4), frozen_dtype=torch.bfloat16)
    teacher = Teacher(tiny_teacher(**SIZES).bfloat16())
    return prepare_pair(student, teacher, share=True, device=torch.device(device))


def batches(packed: bool, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        tokens = torch.randint(3, 90, (2, 128), generator=generator)
        cuts = sorted(torch.randint(1, 256, (3 + number,), generator=generator).tolist())
        bounds = torch.tensor(sorted({0, 128, 256, *cuts}), dtype=torch.int32) if packed else None
        made.append(Batch(tokens, (), bounds).to("cuda"))
    return made


def trained(packed: bool, record: bool, micros: int) -> tuple[list[dict[str, float]], list[torch.Tensor], Any]:
    """Numbers of ten steps and the weights after them."""
    student, teacher = pair("cuda")
    step: Any = make_step(STAGE, student, teacher, torch.autocast("cuda", dtype=torch.bfloat16))
    student.model.train()
    if record:
        step = recorded(step, student, 256, torch.device("cuda"), pytest.fail)
    parameters = list(student.trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    told = []
    for number, batch in enumerate(batches(packed, 10)):
        for _, mixer in student.mixers:
            mixer.schedule(0.0 if number < 2 else 1.0, 128)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(micros):
            measured = step.backward(step.prepare(batch), 1 / micros, measure=number == 5)
        optimizer.step()
        for _, mixer in student.mixers:
            mixer.after_step()
        told.append({name: float(value) for name, value in measured.items()})
    return told, [*(p.detach().clone() for p in parameters), *student.buffers.values()], step


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed documents"])
@pytest.mark.parametrize("micros", [1, 2])
def test_replayed_steps_are_queued_steps(packed: bool, micros: int) -> None:
    numbers, weights, _ = trained(packed, record=False, micros=micros)
    again, replayed, step = trained(packed, record=True, micros=micros)
    assert isinstance(step, RecordedDistil)
    assert len(step._records) == 1
    if packed:  # empty documents at the end change the order of some sums
        for one, two in zip(numbers, again, strict=True):
            assert two == pytest.approx(one, rel=2e-2, abs=1e-4)
        return
    assert again == numbers
    assert all(torch.equal(one, two) for one, two in zip(weights, replayed, strict=True))


@pytest.mark.gpu
def test_kinds_that_take_turns_are_kept_side_by_side() -> None:
    student, teacher = pair("cuda")
    step: Any = make_step(STAGE, student, teacher, torch.autocast("cuda", dtype=torch.bfloat16))
    student.model.train()
    both = recorded(step, student, 256, torch.device("cuda"), pytest.fail)
    parameters = list(student.trained().values())
    for rows, packed in zip(batches(False, 6), batches(True, 6), strict=True):
        for batch in (rows, packed):
            found = []
            for each in (both, step):
                for parameter in parameters:
                    parameter.grad = None
                torch.manual_seed(2)  # scorers drop the same
                measured = each.backward(each.prepare(batch), 1.0, measure=False)
                found.append((float(measured["loss"]), [p.grad.clone() for p in parameters if p.grad is not None]))
            assert found[0][0] == pytest.approx(found[1][0], rel=1e-2)
            if batch.bounds is None:
                assert all(torch.equal(one, two) for one, two in zip(found[0][1], found[1][1], strict=True))
    assert len(both._records) == 2


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_queued_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair("cuda")
    step: Any = make_step(STAGE, student, teacher, torch.autocast("cuda", dtype=torch.bfloat16))
    student.model.train()
    told: list[str] = []
    step = recorded(step, student, 256, torch.device("cuda"), told.append)
    targets = Teacher.targets

    def waiting(self: Teacher, batch: Batch) -> Any:
        float(batch.tokens.sum())  # a graph cannot wait for the device
        return targets(self, batch)

    monkeypatch.setattr(Teacher, "targets", waiting)
    for batch in batches(False, QUEUED_FIRST + 3):
        measured = step.backward(step.prepare(batch), 1.0, measure=False)
        assert torch.isfinite(measured["loss"])
    assert len(told) == 1
    assert "launch by launch" in told[0]
