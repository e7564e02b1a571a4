"""One of two processes of `hybridize distill`, of which the second is killed at the beginning of its second step.

The first then waits as one waits in CUDA for a message of NCCL: in native code, where Python hears no signal and
nothing can be raised.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any, NoReturn

from hybridize.cli.main import main
from hybridize.distillation import lifeline
from hybridize.distillation.trainer import Trainer

GRACE_S = 1.0


def wait_for_ever() -> NoReturn:
    """In the C library, with Python's lock let go: locks one mutex twice."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    while True:
        library.pthread_mutex_lock(mutex)


def ends_in_second_step(step: Any) -> Any:
    """A trainer's step that is never finished in the second step."""

    def stepped(trainer: Trainer, *args: Any) -> Any:
        if trainer.progress.step == 1:
            if trainer.processes.index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for_ever()
        return step(trainer, *args)

    return stepped


if __name__ == "__main__":
    lifeline.GRACE_S = GRACE_S
    Trainer._step = ends_in_second_step(Trainer._step)  # type: ignore[method-assign]
    sys.argv[0] = "hybridize"
    main()
