"""What is told of a step: a line in metrics.jsonl, and fields beside the progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybridize.distillation.data import Batch
from hybridize.distillation.gradients import Norms
from hybridize.distillation.metrics import MetricsFile
from hybridize.distillation.run_state import Progress
from hybridize.progress import Task
from hybridize.recipe.schema import Stage

_LAYER, _MIXER = "layer_", "mixer_"


@dataclass(frozen=True)
class StepNote:
    """What the host knows of a step whose numbers are still on the device.

    Attributes:
        stage: of the step; `stage_step` counts from 1 in it, `step` over all stages.
        tokens: of all processes in this step.
        batches: its micro-batches in this process.
        rates: learning rate by parameter group.
        norms: of its gradients.
        mixers: numbers of mixers that the host has, by layer.
        logged: whether the step gets a line.
        peak_bytes: the most that this process had of its GPU's memory in the stage; 0 on a CPU, and without a line.
    """

    stage: Stage
    stage_step: int
    step: int
    tokens: int
    batches: tuple[Batch, ...]
    rates: Mapping[str, float]
    norms: Norms
    mixers: Mapping[int, Mapping[str, float]]
    logged: bool
    peak_bytes: int = 0


def mixer_numbers(metrics: Mapping[int, Mapping[str, Tensor | float]]) -> dict[str, Tensor]:
    """Of the mixers' metrics by layer, those that are on the device, by a name that `StepLog` knows."""
    return {
        f"{_MIXER}{index}.{name}": value
        for index, named in metrics.items()
        for name, value in named.items()
        if isinstance(value, Tensor)
    }


def without_mixers(numbers: Mapping[str, float]) -> dict[str, float]:
    """A step's numbers without those of `mixer_numbers`: losses, also of layers, and the norm of the gradient."""
    return {name: value for name, value in numbers.items() if not name.startswith(_MIXER)}


class StepLog:
    """Writes the steps of a stage, in order.

    Args:
        metrics: None in all processes but the first.
        task: the stage's progress bar.
    """

    def __init__(self, metrics: MetricsFile | None, task: Task) -> None:
        self.metrics, self.task = metrics, task

    def write(self, note: StepNote, numbers: Mapping[str, float], progress: Progress, seconds: float) -> None:
        """Writes a step's numbers, once they are known.

        Args:
            progress: where the run was after it. seconds: what it took.
        """
        tokens_per_s = note.tokens / max(seconds, 1e-9)
        mixers = {index: dict(named) for index, named in note.mixers.items()}
        for name, value in numbers.items():
            if name.startswith(_MIXER):
                index, _, what = name.removeprefix(_MIXER).partition(".")
                mixers.setdefault(int(index), {})[what] = value
        losses = {name: value for name, value in without_mixers(numbers).items() if not name.startswith(_LAYER)}
        self.task.advance(1, **_fields(losses, mixers, tokens_per_s))
        if self.metrics is None or not note.logged:
            return
        layers = {name.removeprefix(_LAYER): value for name, value in numbers.items() if name.startswith(_LAYER)}
        row: dict[str, Any] = {"step": note.step, "stage": note.stage.name, "stage_step": note.stage_step, **losses}
        row |= {f"lr_{name}": rate for name, rate in note.rates.items()}
        if layers:
            row["layers"] = layers
        if mixers:
            row["mixers"] = {str(index): named for index, named in sorted(mixers.items())}
        row |= {"tokens": progress.tokens, "tokens_per_s": round(tokens_per_s, 1)}
        if note.peak_bytes:
            row["peak_memory_bytes"] = note.peak_bytes  # of the first process; those of the others are alike
        self.metrics.write(row | {"seconds": round(progress.seconds, 3)})


def _fields(
    losses: Mapping[str, float], mixers: Mapping[int, Mapping[str, float]], tokens_per_s: float
) -> dict[str, str]:
    fields = {"loss": f"{losses['loss']:.4g}", "tokens/s": f"{tokens_per_s:,.0f}"}
    if "error" in losses:
        fields["error"] = f"{losses['error']:.3g}"
    kept = [named["kept_tokens_mean"] for named in mixers.values() if "kept_tokens_mean" in named]
    if kept:
        fields["kept"] = f"{sum(kept) / len(kept):.0f}"
    return fields
