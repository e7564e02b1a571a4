"""Progress for people: bars on a terminal, a plain line every half minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hybridize.cli.format import seconds_text
from hybridize.progress import Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 30.0


class BarReporter:
    """Rich bars; tasks opened inside others are shown below them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None

    @contextmanager
    def task(self, description: str, total: float | None) -> Iterator[Task]:
        outermost = self._progress is None
        progress = self._progress or self._start()
        try:
            identity = progress.add_task(description, total=total, fields="")
            yield _Bar(progress, identity)
            progress.refresh()
            progress.update(identity, visible=outermost)
        finally:
            if outermost:
                progress.stop()
                self._progress = None

    def note(self, message: str) -> None:
        self.console.print(message, soft_wrap=True)

    def _start(self) -> Progress:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[fields]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        progress.start()
        self._progress = progress
        return progress


class _Bar:
    def __init__(self, progress: Progress, identity: TaskID) -> None:
        self.progress = progress
        self.identity = identity

    def advance(self, steps: float = 1, **fields: str) -> None:
        if fields:
            self.progress.update(self.identity, advance=steps, fields=_fields_text(fields))
        else:
            self.progress.update(self.identity, advance=steps)


class LineReporter:
    """A line when a task starts, every `LINE_EVERY_S` seconds, and when it ends.

    Args:
        console: where the lines go.
        clock: seconds, for tests.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock

    @contextmanager
    def task(self, description: str, total: float | None) -> Iterator[Task]:
        line = _Line(self, description, total)
        yield line
        line.show("done")

    def note(self, message: str) -> None:
        self.console.print(message, soft_wrap=True)


class _Line:
    def __init__(self, reporter: LineReporter, description: str, total: float | None) -> None:
        self.reporter, self.description, self.total = reporter, description, total
        self.done = 0.0
        self.fields: dict[str, str] = {}
        self.started = self.shown = reporter.clock()
        reporter.console.print(f"{description} ...", soft_wrap=True)

    def advance(self, steps: float = 1, **fields: str) -> None:
        self.done += steps
        self.fields.update(fields)
        if self.reporter.clock() - self.shown >= LINE_EVERY_S:
            self.show(self._left())

    def show(self, end: str) -> None:
        """Prints the line."""
        self.shown = self.reporter.clock()
        count = f"{self.done:g}" + (f"/{self.total:g}" if self.total is not None else "")
        parts = [f"{self.description}:", count, _fields_text(self.fields), seconds_text(self.shown - self.started), end]
        self.reporter.console.print(" ".join(part for part in parts if part), soft_wrap=True)

    def _left(self) -> str:
        if not self.total or not self.done:
            return ""
        elapsed = self.reporter.clock() - self.started
        return f"(left {seconds_text(elapsed * (self.total - self.done) / self.done)})"


def _fields_text(fields: dict[str, str]) -> str:
    return " ".join(f"{name} {value}" for name, value in fields.items())
