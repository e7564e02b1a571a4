"""Numbers as cells of heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridize.report.blocks import Heat, HeatMap
from hybridize.report.numbers import rounded


def share_heat(share: float, full: str = "") -> Heat:
    """A share in per cent, coloured by itself."""
    return Heat(f"{share * 100:.0f}", min(max(share, 0.0), 1.0), full or f"{share * 100:.2f} %")


def level_heat(value: float, low: float, high: float) -> Heat:
    """A positive number, coloured by where its logarithm lies between those of two others."""
    reach = math.log(high) - math.log(low)
    level = (math.log(value) - math.log(low)) / reach if reach > 0 else 0.5
    return Heat(rounded(value, 2), min(max(level, 0.0), 1.0), f"{value:.6g}")


def by_head(
    title: str,
    layers: Sequence[Mapping[str, Any]],
    heat: Callable[[Any], Heat | None],
    note: str = "",
) -> HeatMap:
    """Layers (rows) by heads (columns); `heat` makes a cell of what a layer says of a head."""
    most = max(len(layer["heads"]) for layer in layers)
    rows = [
        (f"layer {layer['index']}", [*map(heat, layer["heads"]), *[None] * (most - len(layer["heads"]))])
        for layer in layers
    ]
    return HeatMap(title, "head", [str(head) for head in range(most)], rows, note)
