"""From numbers to places on an axis, and the numbers that are written along it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hybridize.report.numbers import rounded


@dataclass(frozen=True)
class Axis:
    """How one direction of a chart is drawn.

    Attributes:
        label: what it shows, with its unit.
        base: of a logarithmic axis; None: linear.
        ticks: the values to write; none: chosen.
        show: how a value is written.
        low, high: values that the axis reaches at least.
    """

    label: str
    base: int | None = None
    ticks: Sequence[float] = ()
    show: Callable[[float], str] = rounded
    low: float | None = None
    high: float | None = None

    def scale(self, values: Iterable[float], start: float, end: float) -> Scale:
        """The scale that shows all `values` between the places `start` and `end`."""
        shown = [*values, *self.ticks, *(bound for bound in (self.low, self.high) if bound is not None)]
        if self.base is not None:
            shown = [value for value in shown if value > 0]
        nothing = (0.0, 1.0) if self.base is None else (1.0, float(self.base))
        low, high = (min(shown), max(shown)) if shown else nothing
        if low == high:
            pad = abs(low) * 0.1 or 1.0
            low, high = (low / 1.2, high * 1.2) if self.base is not None else (low - pad, high + pad)
        return Scale(low, high, start, end, self.base, tuple(self.ticks))


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    base: int | None = None
    fixed: tuple[float, ...] = ()

    def __call__(self, value: float) -> float:
        """The place of a value; values beyond an end are put there."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.base is not None:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the scale, at most about `most`."""
        if self.fixed:
            step = -(-len(self.fixed) // most)
            return list(self.fixed[::step])
        if self.base is None:
            return _linear_ticks(self.low, self.high, most)
        first = math.ceil(math.log(self.low, self.base) - 1e-9)
        last = math.floor(math.log(self.high, self.base) + 1e-9)
        step = max(1, -(-(last - first + 1) // most))
        powers = [float(self.base) ** n for n in range(first, last + 1, step)]
        return powers if len(powers) > 1 else _linear_ticks(self.low, self.high, most)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]
