"""Before the first step: mixers take their start from what the teacher's attention does with some training text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch

from hybridize.distillation.data import Batch
from hybridize.distillation.lora import Student
from hybridize.distillation.processes import Processes
from hybridize.distillation.sharding import is_sharded
from hybridize.distillation.stages import TeacherAnswers
from hybridize.errors import RecipeError
from hybridize.progress import Reporter
from hybridize.recipe.schema import Stage


@runtime_checkable
class Calibratable(Protocol):
    """A mixer whose new parameters can be set from text, as long as its projections are the teacher's."""

    def calibrate(self, calls: Sequence[Mapping[str, Any]]) -> None:
        """Sets the new parameters; `calls` are the arguments of `forward` for a sequence each."""


@torch.no_grad()
def start_from_text(
    stage: Stage,
    student: Student,
    teacher: TeacherAnswers,
    batches: Sequence[Batch],
    processes: Processes,
    autocast: AbstractContextManager[Any],
    reporter: Reporter,
) -> None:
    """Calibrates every mixer that can be. Of several processes, all get what the first one found in its text.

    Args:
        batches: one sequence each, on the device.

    Raises:
        RecipeError: no mixer can be calibrated, or the weights are sharded.
    """
    where = f"stage {stage.name}: calibrate_sequences"
    found = {index: mixer for index, mixer in student.mixers if isinstance(mixer, Calibratable)}
    if not found:
        raise RecipeError("No layer has a mixer that starts from text.", where=where, hint="Remove the key.")
    if any(map(is_sharded, student.trained().values())):
        what = "Mixers cannot be calibrated while their weights are sharded."
        raise RecipeError(what, where=where, hint="Set it to 0, or launch without FSDP.")
    with autocast:
        traces = [teacher.trace(batch, found) for batch in batches]
        with reporter.task(f"{stage.name} (calibrate)", len(found)) as task:
            for index, mixer in found.items():
                mixer.calibrate([trace.pop(index).inputs() for trace in traces])
                task.advance(1)
    for parameter in student.groups["mixers"].values():
        parameter.copy_(processes.sum(parameter * processes.is_first))
