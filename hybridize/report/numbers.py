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


def found(cell: Mapping[str, Any] | None) -> str:
    """A recall cell: "9/10 (60-98 %)", the interval being Wilson's at 95 %."""
    if cell is None:
        return ABSENT
    return f"{cell['hits']}/{cell['samples']} ({cell['low'] * 100:.0f}-{cell['high'] * 100:.0f} %)"


def percent(value: float | None) -> str:
    """A share: 0.931 -> "93.1 %"."""
    return ABSENT if value is None else f"{value * 100:.1f} %"


def tokens(count: int) -> str:
    """A context length as the field writes it: 8192 -> "8k", 1000 -> "1000"."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)
