"""SIGTERM and SIGINT ask the loop to save and stop at the next step edge; a second one ends the process at once.

A process that a launcher started may get one wish twice: a batch system signals the launcher and its processes alike,
and torchrun passes its own on. There, what comes soon after the first one is the same wish.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_WISH_S = 5.0
"""How long after a first signal others are taken for the same, in a process that a launcher started."""


class StopRequest:
    """Which signal came, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.met = False
        """Everything is saved and this process about to end: the launcher, when others have, need not end it."""

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Of the signal, for a sentence; it may have reached another process."""
        return "a signal" if self.signal is None else self.signal.name


@contextmanager
def stop_requests(*, launched: bool = False) -> Iterator[StopRequest]:
    """Listens for the signals inside the block; outside the main thread, where Python cannot, nothing is heard.

    Args:
        launched: a launcher started this process among others.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    first_at = 0.0

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal first_at
        if request.met:
            return
        if not request:
            request.signal, first_at = signal.Signals(number), time.monotonic()
            if launched:
                return
        elif time.monotonic() - first_at < SAME_WISH_S:
            return
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if launched:
            signal.raise_signal(number)

    previous = {each: signal.signal(each, hear) for each in SIGNALS}
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
