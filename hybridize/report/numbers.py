"""How numbers are written for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ABSENT = "-"


def size(num_bytes: float) -> str:
    """Bytes with a binary unit: 1536 -> "1.5 KiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def with_error(row: Mapping[str, Any], name: str, digits: int = 2, factor: float = 1.0) -> str:
    """A value and its standard error, where there is one: "12.31 ± 0.40"."""
    value, error = row.get(name), row.get(f"{name}_se")
    if value is None:
        return ABSENT
    text = f"{value * factor:.{digits}f}" if abs(value * factor) < 1e6 else f"{value * factor:.2e}"
    return text if error is None else f"{text} ± {error * factor:.{digits}f}"


def share(cell: Mapping[str, Any] | None) -> str:
    """A share with Wilson's interval at 95 %: "90.0 % (60-98 %)"."""
    if cell is None:
        return ABSENT
    return f"{percent(cell['share'])} ({cell['low'] * 100:.0f}-{cell['high'] * 100:.0f} %)"


def ratio(kept: Mapping[str, Any] | None) -> str:
    """Student over teacher with its interval at 95 %: "× 0.50 (0.27-0.78)"; without an upper end "× 0.50 (≥ 0.27)"."""
    if kept is None:
        return ABSENT
    high = kept["high"]
    interval = f"≥ {kept['low']:.2f}" if high is None else f"{kept['low']:.2f}-{high:.2f}"
    return f"× {kept['value']:.2f} ({interval})"


def percent(value: float | None) -> str:
    """A share: 0.931 -> "93.1 %"."""
    return ABSENT if value is None else f"{value * 100:.1f} %"


def rounded(value: float | None, digits: int = 3) -> str:
    """Significant digits, never in the form 1e+03: 1234.5 -> "1,234", 0.01234 -> "0.0123"."""
    if value is None:
        return ABSENT
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.2e}"
    text = f"{value:.{digits}g}"
    return f"{value:.1e}" if "e" in text else text


def tokens(count: int) -> str:
    """A context length as the field writes it: 8192 -> "8k", 1000 -> "1000"."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def ranges(indices: list[int]) -> str:
    """Layer numbers: [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
