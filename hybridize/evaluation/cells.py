"""Scores gathered into cells of results: a share with its interval, and what of the teacher's is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridize.evaluation.statistics import share_ratio_interval, wilson_interval

Cell = dict[str, Any]


def share_cell(scores: Sequence[float]) -> Cell:
    """{"share", "samples", "low", "high"} of scores between 0 and 1; Wilson's 95 % interval.

    Scores that are parts (two of four answers) vary less than hits with the same mean, so the interval is then wider
    than it need be.
    """
    total = sum(scores)
    low, high = wilson_interval(total, len(scores))
    return {"share": total / len(scores), "samples": len(scores), "low": low, "high": high}


def pair_cell(scores: Mapping[str, Sequence[float]]) -> Cell:
    """{"student", "teacher", "kept"}: the cells of both on the same items, and student over teacher.

    "kept" is {"value", "low", "high"} (95 %, `share_ratio_interval`), or None without a teacher or where it scores
    nothing. A model that was not asked has None.
    """
    cells: Cell = {name: share_cell(scores[name]) if name in scores else None for name in ("student", "teacher")}
    student, teacher = cells["student"], cells["teacher"]
    kept = None
    if student is not None and teacher is not None and teacher["share"] > 0:
        low, high = share_ratio_interval(
            (student["share"], student["low"], student["high"]), (teacher["share"], teacher["low"], teacher["high"])
        )
        kept = {"value": student["share"] / teacher["share"], "low": low, "high": high}
    return {**cells, "kept": kept}
