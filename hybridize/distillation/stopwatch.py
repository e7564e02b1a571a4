"""Times the steps of a trainer until their median is known."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hybridize.distillation.forecast import Kind
from hybridize.distillation.signals import SIGNALS, StopRequest
from hybridize.progress import Task

_STABLE = 0.02
_SAMPLES = 3


class Stopwatch:
    """Times the steps of a stage as they are done, and asks for the end when it knows enough.

    Args:
        wanted: kinds of steps of which something has to be known.
        limit_s: ends after this many seconds, without the first steps, once every kind was seen.
        clock: seconds.
        settling: how many first steps are kept apart.
    """

    def __init__(self, wanted: set[Kind], limit_s: float, clock: Callable[[], float], settling: int = 1) -> None:
        self.wanted, self.limit_s, self.clock, self.settling = wanted, limit_s, clock, settling
        self.stop = StopRequest()
        self.seconds: dict[Kind, list[float]] = {}
        self.first_s = 0.0
        self._begun: deque[Kind] = deque()
        self._edges: list[float] = [clock()]

    def begin(self, kind: Kind) -> None:
        """A step of this kind is queued."""
        self._begun.append(kind)

    def advance(self, steps: float = 1, **fields: str) -> None:
        """The oldest step that was queued is done: a stopwatch is the task of a reporter."""
        now, kind = self.clock(), self._begun.popleft()
        passed = now - self._edges[-1]
        self._edges.append(now)
        if len(self._edges) <= self.settling + 1:
            self.first_s += passed
        elif not self.stop:
            self.seconds.setdefault(kind, []).append(passed)
            if self._knows_enough():
                self.stop.signal = SIGNALS[0]

    def _knows_enough(self) -> bool:
        if not self.wanted <= self.seconds.keys():
            return False
        if self._edges[-1] - self._edges[self.settling] >= self.limit_s:
            return True
        plain = [found for kind, found in self.seconds.items() if not kind.measures]
        return all(len(found) >= _SAMPLES and _is_stable(found) for found in plain)

    # A reporter with one task.

    @contextmanager
    def task(self, description: str, total: float | None) -> Iterator[Task]:
        yield self

    def note(self, message: str) -> None:
        """Nobody listens."""


def _is_stable(values: list[float]) -> bool:
    """Whether more values would hardly move the median: their mean distance from it, over the root of their number."""
    middle = statistics.median(values)
    distance = statistics.mean(abs(value - middle) for value in values)
    return distance <= _STABLE * middle * math.sqrt(len(values))
