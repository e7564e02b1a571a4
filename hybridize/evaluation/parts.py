"""Cuts window scores by source and by position, for the probes that average over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hybridize.evaluation.scores import WindowScores
from hybridize.evaluation.statistics import Mean, clustered_mean, position_buckets

Row = dict[str, Any]
Summary = Callable[[Sequence[WindowScores]], Row]


def breakdown(scores: Sequence[WindowScores], edges: Sequence[int], summary: Summary) -> Row:
    """`summary` of everything, by source (a dictionary) and by position (rows with "from" and "to", half-open)."""
    sources = sorted({score.window.source for score in scores})
    longest = max(len(score.window.tokens) for score in scores)
    by_position = []
    for start, end in position_buckets(edges, longest):
        inside = [part for score in scores if (part := between(score, start, end)) is not None]
        if inside:
            by_position.append({"from": start, "to": end, **summary(inside)})
    every = [part for score in scores if (part := between(score, 0, longest)) is not None]
    return {
        **summary(every),
        "by_source": {source: summary([part for part in every if part.window.source == source]) for source in sources},
        "by_position": by_position,
    }


def between(score: WindowScores, start: int, end: int) -> WindowScores | None:
    """The scores of tokens at positions start..end-1; None where there are none. Start tokens are never scored."""
    # Entry i is the token at position i + 1; the first token has nothing before it and no score.
    span = slice(max(start, score.window.num_prefix, 1) - 1, max(end, 1) - 1)
    if score.student[span].numel() == 0:
        return None

    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[span]

    return WindowScores(score.window, score.student[span], cut(score.teacher), cut(score.kl), cut(score.same_top))


def mean_of(values: Sequence[Tensor]) -> Mean:
    """Mean over the tokens of windows' scores, with the windows as clusters."""
    return clustered_mean([float(v.sum()) for v in values], [v.numel() for v in values])


def size_of(scores: Sequence[WindowScores]) -> Row:
    """How much text a row stands for."""
    return {"tokens": sum(score.student.numel() for score in scores), "windows": len(scores)}
