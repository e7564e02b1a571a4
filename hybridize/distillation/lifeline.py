"""A line from each process of a run to the others that breaks when one of them ends, however it ends.

Collectives do not tell. A process that waits for a lost one in NCCL waits in the driver, where neither an exception nor
a signal reaches Python; after the timeout, ten minutes, NCCL's watchdog aborts it without a sentence. So the first
process has a plain connection to each of the others, and a thread of every process listens. The kernel closes the
connections of a process that dies; that a machine vanished is found by TCP's keep-alive. The first process passes on
who was lost. A process that lives and hangs is left to the timeouts of the collectives.

A loss counts while a process is `bound`, which is while it needs the others. It then has `GRACE_S` to end by itself,
with this error or a better one of its own. A main thread that cannot is not waited for: the thread tells the loss and
ends the process with the error's exit code. That is safe at every moment: what stands on disk under a final name is
always whole.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from hybridize.errors import MET_BY_ALL, NumbersError, ProcessLostError

GRACE_S = 10.0
"""How long a process that needs a lost one may take to end by itself."""
TELL_S = 5.0
"""How long telling may take: standard error may be a pipe that nobody reads."""
_LOOK_EVERY_S = 0.05

_MESSAGE = struct.Struct("!ci")
_LOST, _DONE = b"l", b"d"
"""With the number of a lost process; with the exit code of what the first process did for all."""

Tell = Callable[[ProcessLostError], object]


def log_loss(error: ProcessLostError) -> None:
    """To the log of this module; Python writes that to standard error where nobody set up another."""
    logging.getLogger(__name__).critical("%s", error)


def loss_of(process: int) -> ProcessLostError:
    """The error for a process, by its number."""
    return ProcessLostError(f"A process of this run was lost: number {process}, counted from 0.")


class Lifeline:
    """One process's end of the lines.

    Args:
        connections: by the number of the process at the other end; the first has one to each other, those one to it.

    Attributes:
        lost: the number of the process that was lost first, as far as this one knows.
        closed: it was left.
        tell: is given the loss before the thread ends the process, in the thread.
    """

    def __init__(self, connections: Mapping[int, socket.socket], tell: Tell = log_loss) -> None:
        self.tell = tell
        self.lost: int | None = None
        self._connections = dict(connections)
        self._news = threading.Condition()
        self._codes: deque[int] = deque()
        self._bound = self._undisturbed = 0
        self.closed = False
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    # In the main thread.

    def check(self, within_s: float = 0.0) -> None:
        """Before something that needs all processes.

        Args:
            within_s: wait so long for the news of a loss.

        Raises:
            ProcessLostError: one was lost.
        """
        if within_s:
            with self._news:
                self._news.wait_for(lambda: self.lost is not None, within_s)
        if self.lost is not None:
            raise loss_of(self.lost)

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Needs the others inside the block. An error that only this process meets ends the lines before it ends.

        Those that all meet leave the others to meet them.

        Raises:
            ProcessLostError: one was lost before.
        """
        self._bound += 1  # before the look at what is lost: the thread looks at this
        try:
            self.check()
            yield
        except (*MET_BY_ALL, NumbersError):
            raise
        except BaseException:
            self.close()
            raise
        finally:
            with self._news:  # held by the thread while it ends the process
                self._bound -= 1

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Needs nobody inside the block, and is not to be ended by a loss (a checkpoint is written)."""
        self._undisturbed += 1
        try:
            yield
        finally:
            self._undisturbed -= 1

    def done(self, code: int = 0) -> None:
        """Tells all others that the first process did what they wait for in `wait_for_first`."""
        for process in tuple(self._connections):
            self._send(process, _DONE, code)

    def wait_for_first(self) -> int:
        """Waits for the first process's `done`, however long it takes; signals are heard. Need not be `bound`.

        Returns:
            its code.

        Raises:
            ProcessLostError: a process was lost.
        """
        with self._news:
            self._news.wait_for(lambda: self._codes or self.lost is not None)
            if self._codes:
                return self._codes.popleft()
        raise loss_of(self.lost or 0)

    def close(self) -> None:
        """Leaves: for the others this process is lost from now on, for this one nobody is any more."""
        self.closed = True
        for connection in self._connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it

    def _forget(self) -> None:
        """In the child of a fork: its copies of the connections would outlive this process."""
        self.closed = True
        for connection in self._connections.values():
            connection.close()

    # In the thread.

    def _listen(self) -> None:
        unread = dict.fromkeys(self._connections, b"")
        with selectors.DefaultSelector() as selector:
            for process, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while self.lost is None and not self.closed:
                for key, _ in selector.select():
                    received = _receive(self._connections[key.data])
                    if not received:
                        self._note(key.data)
                        break
                    unread[key.data] = self._take(unread[key.data] + received)
        if not self.closed:
            self._give_grace()
        for connection in self._connections.values():
            connection.close()

    def _take(self, received: bytes) -> bytes:
        """Acts on whole messages; returns what is left."""
        whole = len(received) // _MESSAGE.size * _MESSAGE.size
        for kind, number in _MESSAGE.iter_unpack(received[:whole]):
            if kind == _LOST:
                self._note(number)
            else:
                with self._news:
                    self._codes.append(number)
                    self._news.notify_all()
        return received[whole:]

    def _note(self, process: int) -> None:
        if self.closed:
            return
        with self._news:
            if self.lost is None:
                self.lost = process
            self._news.notify_all()
        for other in self._connections:
            if other != process:
                self._send(other, _LOST, process)

    def _send(self, process: int, kind: bytes, number: int) -> None:
        with suppress(OSError):  # that it is gone is heard elsewhere
            self._connections[process].sendall(_MESSAGE.pack(kind, number))

    def _give_grace(self) -> None:
        """Until the main thread no longer needs the others; ends the process if it goes on to."""
        left_s = GRACE_S
        while self._bound and not self.closed:
            if left_s <= 0:
                with self._news:
                    if self._bound:
                        self._end()
                return
            time.sleep(_LOOK_EVERY_S)
            if not self._undisturbed:
                left_s -= _LOOK_EVERY_S

    def _end(self) -> None:
        error = loss_of(self.lost or 0)
        try:
            limit = threading.Timer(TELL_S, os._exit, (error.exit_code,))
            limit.daemon = True
            limit.start()
            self.tell(error)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(error.exit_code)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except OSError:  # reset, or no longer kept alive
        return b""
