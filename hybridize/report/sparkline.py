"""A curve in one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def means(values: Sequence[float], most: int) -> list[float]:
    """A curve of at most that many values: the means over equal spans."""
    length = min(most, len(values))
    edges = [round(i * len(values) / length) for i in range(length + 1)] if length else []
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draws values from left to right, the smallest as ▁ and the largest as █.

    Args:
        values: of the curve; those that are not finite are left out.
        width: longest line; longer curves are averaged over equal spans.
    """
    heights = means([value for value in values if math.isfinite(value)], max(width, 0))
    if not heights:
        return ""
    low, high = min(heights), max(heights)
    if high == low:
        return _BLOCKS[0] * len(heights)
    return "".join(_BLOCKS[min(int((h - low) / (high - low) * len(_BLOCKS)), len(_BLOCKS) - 1)] for h in heights)
