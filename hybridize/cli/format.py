"""Numbers in words: bytes, counts, durations, runs of layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def bytes_text(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def count_text(count: float) -> str:
    """134515008 -> "134.5 M"."""
    for unit in ("", " k", " M"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:,.2f} B"


def seconds_text(seconds: float) -> str:
    """3723 -> "1:02:03"; 63 -> "1:03"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def ranges_text(indices: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"; evenly spaced indices -> "0, 3, ... 27"."""
    if len(indices) > 3:
        steps = {after - before for before, after in itertools.pairwise(indices)}
        if len(steps) == 1 and steps != {1}:
            return f"{indices[0]}, {indices[1]}, ... {indices[-1]}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def table_lines(rows: Sequence[Sequence[str]], *, left: int = 0) -> list[str]:
    """Rows as lines with aligned columns; the first `left` columns to the left, the others to the right."""
    width = max((len(row) for row in rows), default=0)
    full = [[*row, *[""] * (width - len(row))] for row in rows]
    sizes = [max(len(row[column]) for row in full) for column in range(width)]
    lines = []
    for row in full:
        cells = [
            cell.ljust(size) if column < left else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
