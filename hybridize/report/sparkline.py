"""A curve in one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draws values from left to right, the smallest as ▁ and the largest as █.

    Args:
        values: of the curve; those that are not finite are left out.
        width: longest line; longer curves are averaged over equal spans.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    length = min(width, len(finite))
    edges = [round(i * len(finite) / length) for i in range(length + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * length
    return "".join(_BLOCKS[min(int((mean - low) / (high - low) * len(_BLOCKS)), len(_BLOCKS) - 1)] for mean in means)
