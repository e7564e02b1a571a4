"""What a distillation takes, by arithmetic: the steps that a recipe has, times what a step of each kind took.

Steps differ: those of an align stage that take new micro-batches ask the teacher, those that use them again do not; now
and then a step measures more than it needs. So seconds are kept by kind, and every kind counts as often as it occurs.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybridize.distillation.schedule import Shape, batch_shape, ramp_progress
from hybridize.distillation.trainer import MEASURE_EVERY_STEPS
from hybridize.recipe.schema import Data, Distill, Stage


@dataclass(frozen=True)
class Kind:
    """Of a step: whether it takes new micro-batches, and whether it measures what it could do without."""

    fresh: bool
    measures: bool


@dataclass(frozen=True)
class Part:
    """The steps of a stage that are alike.

    Attributes:
        counts: how many steps there are of each kind.
        ramp: mean progress, in 0..1, of the budget's ramp over these steps.
        ramping: the budget moves from step to step; on a GPU such steps are not recorded.
    """

    stage: Stage
    shape: Shape
    counts: Mapping[Kind, int]
    ramp: float = 1.0
    ramping: bool = False

    @property
    def steps(self) -> int:
        return sum(self.counts.values())

    @property
    def step_tokens(self) -> int:
        """Of one process."""
        return self.shape.sequences * self.shape.tokens * self.stage.accumulate


@dataclass(frozen=True)
class Rehearsed:
    """What the steps of a part took.

    Attributes:
        shape, accumulate: of the steps that were run; smaller than the part's where those take too long or do not fit.
        seconds: of each step, by kind, without the first ones.
        first_steps_seconds: beyond later ones: kernels are compiled, memory is claimed, a step is recorded.
        peak_bytes: at most in use. fixed_bytes: of them, what does not grow with the tokens of a micro-batch.
        reserved_bytes: taken from the device; 0: not known.
        too_large: a micro-batch that ran out of memory, if any did.
    """

    shape: Shape
    accumulate: int
    seconds: Mapping[Kind, Sequence[float]]
    first_steps_seconds: float
    peak_bytes: float
    fixed_bytes: float
    reserved_bytes: float = 0.0
    too_large: Shape | None = None


@dataclass(frozen=True)
class Saving:
    """One checkpoint that was written and verified."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class PartForecast:
    """What the steps of a part will take."""

    shape: Shape
    accumulate: int
    ramping: bool
    steps: int
    seconds_per_step: float
    tokens_per_s: float
    peak_bytes: float
    reserved_bytes: float
    rehearsed_shape: Shape
    rehearsed_accumulate: int
    rehearsed_steps: int
    extrapolated: bool
    """The numbers are those of fewer tokens, in proportion."""
    fits: bool

    @property
    def seconds(self) -> float:
        return self.steps * self.seconds_per_step


@dataclass(frozen=True)
class StageForecast:
    """What a stage will take.

    Attributes:
        parts: by shape, in order.
        saving_seconds: for its checkpoints.
        problem: why it will not run as the recipe has it; "" if nothing speaks against it.
    """

    name: str
    kind: str
    parts: tuple[PartForecast, ...]
    saving_seconds: float
    problem: str = ""

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.parts)

    @property
    def seconds(self) -> float:
        """Of its steps and checkpoints."""
        return sum(part.seconds for part in self.parts) + self.saving_seconds

    @property
    def peak_bytes(self) -> float:
        return max(part.peak_bytes for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        seconds = sum(part.seconds for part in self.parts)
        tokens = sum(part.seconds * part.tokens_per_s for part in self.parts)
        return {
            "name": self.name,
            "kind": self.kind,
            "steps": self.steps,
            "seconds": self.seconds,
            "seconds_per_step": seconds / self.steps,
            "saving_seconds": self.saving_seconds,
            "tokens_per_s": tokens / seconds,
            "peak_bytes": round(self.peak_bytes),
            "extrapolated": any(part.extrapolated for part in self.parts),
            "problem": self.problem,
            "shapes": [asdict(part) for part in self.parts],
        }


def parts_of(distill: Distill, data: Data) -> tuple[Part, ...]:
    """The steps of a run by stage, by shape, and by whether the budget moves, in the order in which they come.

    Raises:
        RecipeError: a curriculum does not double up to its stage's length.
    """
    parts: list[Part] = []
    before = 0
    for stage in distill.stages:
        found: dict[tuple[Shape, bool], list[int]] = {}
        for step in range(stage.steps):
            found.setdefault((batch_shape(stage, data, step), _is_ramping(stage, step)), []).append(step)
        for (shape, ramping), steps in found.items():
            kinds = Counter(_kind(stage, step, before, distill.log_every_steps) for step in steps)
            ramp = statistics.mean(ramp_progress(stage.budget_ramp, step, stage.steps) for step in steps)
            parts.append(Part(stage, shape, kinds, ramp, ramping))
        before += stage.steps
    return tuple(parts)


def _is_ramping(stage: Stage, step: int) -> bool:
    now, before = (ramp_progress(stage.budget_ramp, at, stage.steps) for at in (step, max(step - 1, 0)))
    return now != before


def _kind(stage: Stage, step: int, before: int, log_every: int) -> Kind:
    """Of a step of the stage, which comes after `before` steps of others."""
    every = log_every * math.ceil(MEASURE_EVERY_STEPS / log_every)
    return Kind(
        fresh=stage.kind != "align" or step % stage.passes == 0,
        measures=step in (0, stage.steps - 1) or (before + step + 1) % every == 0,
    )


def seconds_per_step(seconds: Mapping[Kind, Sequence[float]], counts: Mapping[Kind, int]) -> float:
    """The mean over steps of all kinds, each as often as it occurs, from the medians of those that were run.

    What a measurement adds is taken to be the same whether the micro-batches are new or not. A kind that was not run
    takes as long as the one nearest to it.
    """
    plain = {fresh: _median(seconds.get(Kind(fresh, False), ())) for fresh in (True, False)}
    surplus = [
        max(_median(found) - base, 0.0)
        for fresh, base in plain.items()
        if (found := seconds.get(Kind(fresh, True), ())) and math.isfinite(base)
    ]
    added = statistics.mean(surplus) if surplus else 0.0
    anything = _median([second for found in seconds.values() for second in found])
    total = 0.0
    for kind, count in counts.items():
        bases = (plain[kind.fresh], plain[not kind.fresh], anything)
        base = next(base for base in bases if math.isfinite(base))
        total += count * (base + added * kind.measures)
    return total / sum(counts.values())


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def forecast_part(part: Part, rehearsed: Rehearsed, capacity_bytes: float) -> PartForecast:
    """Scales what was run to the part's own shape: seconds in all tokens, memory in those of a micro-batch."""
    ran = rehearsed.shape.sequences * rehearsed.shape.tokens
    step_ratio = part.step_tokens / (ran * rehearsed.accumulate)
    micro_ratio = part.shape.sequences * part.shape.tokens / ran
    seconds = seconds_per_step(rehearsed.seconds, part.counts) * step_ratio
    beyond = max(rehearsed.peak_bytes - rehearsed.fixed_bytes, 0.0) * (micro_ratio - 1)
    peak_bytes = rehearsed.peak_bytes + beyond
    return PartForecast(
        shape=part.shape,
        accumulate=part.stage.accumulate,
        ramping=part.ramping,
        steps=part.steps,
        seconds_per_step=seconds,
        tokens_per_s=part.step_tokens / seconds,
        peak_bytes=peak_bytes,
        reserved_bytes=rehearsed.reserved_bytes + beyond if rehearsed.reserved_bytes else 0.0,
        rehearsed_shape=rehearsed.shape,
        rehearsed_accumulate=rehearsed.accumulate,
        rehearsed_steps=sum(len(found) for found in rehearsed.seconds.values()),
        extrapolated=step_ratio != 1,
        fits=rehearsed.too_large is None and peak_bytes <= capacity_bytes,
    )


def saves_of(distill: Distill) -> dict[str, tuple[int, int]]:
    """Checkpoints of each stage by name: those within it, and the one at its end, which holds no optimiser."""
    found, before = {}, 0
    for stage in distill.stages:
        within = sum((before + step) % distill.save_every_steps == 0 for step in range(1, stage.steps))
        found[stage.name] = (within, 1)
        before += stage.steps
    return found


def problem_of(part: Part, forecast: PartForecast, capacity_bytes: float, *, recomputes: bool) -> str:
    """A sentence on a micro-batch that does not fit, and what to do; "" where the part fits.

    Args:
        recomputes: layers are computed again already where memory demands it.
    """
    if forecast.fits:
        return ""
    wanted, fits = part.shape, forecast.rehearsed_shape
    room = "" if math.isinf(capacity_bytes) else f" into {capacity_bytes / 2**30:,.1f} GiB"
    advice = [] if recomputes else ["gradient_checkpointing: true"]
    if fits.tokens == wanted.tokens:
        micro_batches = math.ceil(part.step_tokens / (fits.sequences * fits.tokens))
        advice.append(f"batch_sequences: {fits.sequences} with accumulate: {micro_batches}")
    else:
        advice.append(f"sequence_tokens: {fits.tokens} with batch_sequences: {fits.sequences}")
    return (
        f"stage {part.stage.name}: {wanted.sequences} x {wanted.tokens:,} tokens do not fit{room}, they need about "
        f"{forecast.peak_bytes / 2**30:,.1f} GiB; {fits.sequences} x {fits.tokens:,} fit. Set {', or '.join(advice)}."
    )
