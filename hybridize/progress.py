"""How long-running functions tell what they do. The command line shows it; by default nobody listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One bar."""

    def advance(self, steps: float = 1, **fields: str) -> None:
        """Moves the bar; `fields` are short texts shown beside it, by name (loss="2.31", kept="212")."""


class Reporter(Protocol):
    """Receives progress."""

    def task(self, description: str, total: float | None) -> AbstractContextManager[Task]:
        """Opens a bar; use as a context manager."""

    def note(self, message: str) -> None:
        """A line the user should see once."""


class _SilentTask:
    def advance(self, steps: float = 1, **fields: str) -> None:
        pass


class Silent:
    """A reporter that shows nothing."""

    @contextmanager
    def task(self, description: str, total: float | None) -> Iterator[Task]:
        yield _SilentTask()

    def note(self, message: str) -> None:
        pass


SILENT: Reporter = Silent()
