"""SIGTERM and SIGINT ask the loop to save and stop at the next step edge; a second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Which signal came, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Of the signal, for a sentence; it may have reached another process."""
        return "a signal" if self.signal is None else self.signal.name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listens for the signals inside the block; outside the main thread, where Python cannot, nothing is heard."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def hear(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    previous = {each: signal.signal(each, hear) for each in SIGNALS}
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
