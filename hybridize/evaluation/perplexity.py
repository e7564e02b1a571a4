"""Perplexity on held-out text, by position and by source, beside the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hybridize.evaluation.parts import Row, breakdown, mean_of, size_of
from hybridize.evaluation.scores import WindowScores
from hybridize.evaluation.statistics import Mean

_LARGEST_EXPONENT = 700.0  # exp beyond it is not a double; a perplexity of 1e304 says "broken" as well as any


def perplexity(scores: Sequence[WindowScores], position_edges: Sequence[int]) -> Row:
    """exp of the mean negative log-likelihood a token, with standard errors (delta method over windows).

    `ratio` is student over teacher on the same tokens; its error is that of the paired difference, so it is much
    smaller than the errors of the two perplexities.

    Returns:
        student, teacher, ratio (each with `_se`; None without teacher or with one window), tokens, windows, by_source,
        by_position.
    """
    return breakdown(scores, position_edges, _summary)


def _summary(scores: Sequence[WindowScores]) -> Row:
    row = {**exponential("student", mean_of([score.student for score in scores]))}
    teacher = [score.teacher for score in scores if score.teacher is not None]
    if teacher:
        difference = [score.student - score.teacher for score in scores if score.teacher is not None]
        row |= exponential("teacher", mean_of(teacher)) | exponential("ratio", mean_of(difference))
    else:
        row |= dict.fromkeys(("teacher", "teacher_se", "ratio", "ratio_se"))
    return row | size_of(scores)


def exponential(name: str, mean: Mean) -> Row:
    """A perplexity and its standard error (delta method) from a mean in nats a token, under `name` and `name`_se."""
    value = math.exp(min(mean.value, _LARGEST_EXPONENT))
    error = None if mean.standard_error is None else value * mean.standard_error
    return {name: value, f"{name}_se": error}
