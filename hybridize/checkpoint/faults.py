"""Fault points: named places where the crash tests stop a process that writes.

``HYBRIDIZE_FAULT=NAME:ACTION[:N]`` makes the N-th pass (default 1) through the point NAME kill the process (``kill``)
or fail with an operating system error (``ENOSPC``, ``EMFILE``, ...). Without the variable a point does nothing.
"""

from __future__ import annotations

import errno
import os
import signal

_passes: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Mark a place where a writer may be cut off; `name` is what HYBRIDIZE_FAULT calls it."""
    wish = os.environ.get("HYBRIDIZE_FAULT")
    if not wish:
        return
    point, _, rest = wish.partition(":")
    action, _, which = rest.partition(":")
    if point != name:
        return
    _passes[name] = _passes.get(name, 0) + 1
    if _passes[name] != int(which or 1):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    number = getattr(errno, action)
    raise OSError(number, os.strerror(number))
