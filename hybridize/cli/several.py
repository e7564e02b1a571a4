"""How one of several processes ends that a launcher started: when it may, and whose words the user reads.

A launcher ends all others with a signal once one has ended. What they all meet, the first process tells; so the others
wait for that signal, and speak if it does not come.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from hybridize.cli.environment import num_processes

TELLS_WITHIN_S = 10.0
"""How far the first process may be behind one that leaves it to it to tell an error."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_left_to_first: list[Callable[[], None]] = []
_launcher_came = threading.Event()


def leave_to_first(tell: Callable[[], None]) -> None:
    """Lets the first process tell an error; `tell` is called in the end if it has not met it."""
    _left_to_first.append(tell)


@contextmanager
def undisturbed_by_launcher() -> Iterator[None]:
    """Only hears signals in the block, in which one of several processes tells why it ends."""
    if num_processes() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {each: signal.signal(each, _hear_launcher) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def leave(code: int) -> NoReturn:
    """Ends the process.

    One of several does it without the interpreter's tidying up when something went wrong: that would wait in CUDA for
    messages to processes that are no more.
    """
    if code and num_processes() > 1:
        if _left_to_first and not _first_has_told():
            for tell in _left_to_first:
                tell()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _first_has_told() -> bool:
    """Waits for the launcher's signal, which comes when the first process has told why all of them end, and ended.

    Were this one gone before, the launcher would end the first one before it had. No signal: the first one has not met
    the error, a file that is missing on one machine, say.
    """
    for each in _SIGNALS:
        signal.signal(each, _hear_launcher)
    return _launcher_came.wait(TELLS_WITHIN_S)


def _hear_launcher(number: int, frame: FrameType | None) -> None:
    _launcher_came.set()
