"""How the processes of a run find each other: a connection from each to the first one, for the lifeline."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from hybridize.errors import ProcessLostError

KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 3}
"""Seconds of silence, seconds between questions, and how many without an answer: a vanished machine is lost in 60 s."""
_GREET_S = 5.0
_LOOK_EVERY_S = 0.05
_GREETING = struct.Struct("!qi")
"""Token and number of a process."""


def connect(
    index: int, count: int, from_first: Callable[[list[int]], list[int]], timeout_s: float
) -> dict[int, socket.socket]:
    """The connections of a process; all have to ask.

    The first process listens where the others found it before, at MASTER_ADDR, or only on its own machine where all are
    on one; only until all are there. A number that the first one drew tells its processes from strangers.

    Args:
        from_first: returns, in every process, the integers that it was given in the first one.

    Raises:
        ProcessLostError: not all of them came.
    """
    deadline = time.monotonic() + timeout_s
    alone = os.environ.get("LOCAL_WORLD_SIZE") == str(count)
    try:
        if index == 0:
            with _server(count, alone=alone) as server:
                _, token = from_first([server.getsockname()[1], secrets.randbits(63)])
                return _accepted(server, token, count, deadline)
        port, token = from_first([0, 0])
        host = "127.0.0.1" if alone else os.environ.get("MASTER_ADDR", "127.0.0.1")
        connection = _kept_alive(socket.create_connection((host, port), timeout=timeout_s))
        connection.sendall(_GREETING.pack(token, index))
    except OSError as error:
        raise ProcessLostError(f"The processes of this run do not reach each other ({error}).") from error
    return {0: connection}


def _server(count: int, *, alone: bool) -> socket.socket:
    if alone:
        return socket.create_server(("127.0.0.1", 0), backlog=count)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=count, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=count)


def _accepted(server: socket.socket, token: int, count: int, deadline: float) -> dict[int, socket.socket]:
    connections: dict[int, socket.socket] = {}
    while len(connections) < count - 1:
        server.settimeout(max(deadline - time.monotonic(), _LOOK_EVERY_S))
        connection, _ = server.accept()
        told, process = _greeting(connection)
        if told == token and process not in connections:
            connections[process] = _kept_alive(connection)
        else:
            connection.close()
    return connections


def _greeting(connection: socket.socket) -> tuple[int, int]:
    """Token and number that a process sends first; what is none has the token -1."""
    connection.settimeout(_GREET_S)
    received = b""
    with suppress(OSError):
        while len(received) < _GREETING.size and (more := connection.recv(_GREETING.size - len(received))):
            received += more
    return _GREETING.unpack(received) if len(received) == _GREETING.size else (-1, 0)


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if (option := getattr(socket, name, None)) is not None:  # not every system has each
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
