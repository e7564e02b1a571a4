"""How close the student's next-token distributions are to the teacher's on held-out text."""

from __future__ import annotations

from collections.abc import Sequence

from hybridize.evaluation.parts import Row, breakdown, mean_of, size_of
from hybridize.evaluation.scores import WindowScores


def agreement(scores: Sequence[WindowScores], position_edges: Sequence[int]) -> Row:
    """Mean KL(teacher || student) in nats a token, and the share of positions where both rank the same token first.

    Returns:
        kl, top1 (each with `_se`, the standard error over windows), tokens, windows, by_source, by_position.
    """
    return breakdown(scores, position_edges, _summary)


def _summary(scores: Sequence[WindowScores]) -> Row:
    kl = mean_of([score.kl for score in scores if score.kl is not None])
    top1 = mean_of([score.same_top for score in scores if score.same_top is not None])
    return {
        "kl": kl.value,
        "kl_se": kl.standard_error,
        "top1": top1.value,
        "top1_se": top1.standard_error,
        **size_of(scores),
    }
