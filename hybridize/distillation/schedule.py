"""What changes over the steps of a stage, as pure functions of the step: rates, the eviction budget, lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybridize.recipe.schema import Data, Ramp, Stage

RAMP_STAIRS = 32
"""Steps with the same budget are alike, and a GPU can replay them."""


@dataclass(frozen=True)
class Shape:
    """Sequences of a micro-batch of one process, and tokens of a sequence."""

    sequences: int
    tokens: int


def batch_shape(stage: Stage, data: Data, step: int) -> Shape:
    """The shape of a micro-batch in step 0..steps-1.

    Raises:
        RecipeError: the curriculum's first length does not become the stage's by doubling.
    """
    tokens = stage.sequence_tokens or data.sequence_tokens
    if stage.curriculum is None:
        return Shape(stage.batch_sequences, tokens)
    doublings = stage.curriculum.doublings(tokens, stage.name)
    lengths_left = doublings - min(int(step / (stage.curriculum.end * stage.steps) * doublings), doublings)
    return Shape(stage.batch_sequences << lengths_left, tokens >> lengths_left)


def learning_rate_factor(stage: Stage, step: int) -> float:
    """Factor on the peak learning rate in step 0..steps-1: linear warm-up, then cosine down to `final_share`."""
    if step < stage.warmup_steps:
        return (step + 1) / (stage.warmup_steps + 1)
    falling_steps = stage.steps - stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(falling_steps - 1, 1)
    return stage.final_share + (1 - stage.final_share) * (1 + math.cos(math.pi * progress)) / 2


def learning_rates(stage: Stage, step: int) -> dict[str, float]:
    """Learning rate of each parameter group ("mixers", "projections", "adapters") in a step."""
    factor = learning_rate_factor(stage, step)
    old_weights = stage.learning_rate if stage.projection_learning_rate is None else stage.projection_learning_rate
    return {
        "mixers": stage.learning_rate * factor,
        "projections": old_weights * factor,
        "adapters": old_weights * factor,
    }


def ramp_progress(ramp: Ramp | None, step: int, steps: int) -> float:
    """Progress in 0..1 of the budget ramp in step 0..steps-1; 1, the final budget, without a ramp.

    It goes in `RAMP_STAIRS` stairs, the first at 0.
    """
    if ramp is None:
        return 1.0
    share = step / max(steps - 1, 1)
    progress = min(max((share - ramp.start) / (ramp.end - ramp.start), 0.0), 1.0)
    return math.ceil(progress * RAMP_STAIRS - 1e-9) / RAMP_STAIRS
