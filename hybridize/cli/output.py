"""The one sink: results go to stdout, everything else to stderr; for people, or as one JSON object."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from hybridize.progress import SILENT, Reporter

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_PIPED_WIDTH = 120


class Output:
    """Shows results, notes, errors and progress.

    Args:
        as_json: one JSON object on stdout instead of text.
        color: False: none; None: where the terminal has it and NO_COLOR is not set.
        verbosity: -1 quiet, 0 normal, 1 and more verbose.
        stderr: instead of the process's own.
        process: this process's number among those that a launcher started. Only the first, 0, speaks; the others tell
            errors that may be theirs alone, on stderr.
    """

    def __init__(
        self,
        *,
        as_json: bool = False,
        color: bool | None = None,
        verbosity: int = 0,
        stderr: TextIO | None = None,
        process: int = 0,
    ) -> None:
        self.as_json = as_json
        self.color = color
        self.verbosity = -1 if process else verbosity
        self.process = process
        self._stderr = stderr
        self._consoles: dict[bool, Console] = {}

    def console(self, *, stderr: bool = True) -> Console:
        """The rich console of a stream."""
        if stderr not in self._consoles:
            from rich.console import Console

            stream = (self._stderr or sys.stderr) if stderr else sys.stdout
            console = self._consoles[stderr] = Console(
                file=stream,
                no_color=self.color is False or bool(os.environ.get("NO_COLOR")),
                width=None if stream.isatty() else _PIPED_WIDTH,
                markup=False,
                highlight=False,
                emoji=False,
            )
            # Left alone, rich would end the program with 1 when the reader has gone (`| head`).
            console.on_broken_pipe = _raise_broken_pipe  # type: ignore[method-assign]
        return self._consoles[stderr]

    def result(self, command: str, values: Mapping[str, Any], human: Iterable[RenderableType] = ()) -> None:
        """The result of a command.

        Args:
            command: names the schema: `hybridize/<command>/1`.
            values: what `--json` prints.
            human: what people see instead: texts and rich tables.
        """
        if self.process:
            return
        if self.as_json:
            self._write_json({"schema": f"hybridize/{command}/1", **values})
            return
        console = self.console(stderr=False)
        for part in human:
            # Text keeps its lines, so that what is piped can be searched and copied.
            console.print(part, soft_wrap=isinstance(part, str))

    def write(self, text: str) -> None:
        """Part of a result, at once and as it is (generated text); nothing with --json."""
        if not self.as_json and not self.process:
            sys.stdout.write(text)
            sys.stdout.flush()

    def ask(self, prompt: str) -> str | None:
        """A line from the user; None at the end of the input."""
        if sys.stdin.isatty():
            self.console().print(prompt, end="")
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    def note(self, message: str) -> None:
        """Something the user should see once."""
        if self.verbosity >= 0:
            self.console().print(message, style="dim", soft_wrap=True)

    def detail(self, message: str) -> None:
        """Something for -v."""
        if self.verbosity > 0:
            self.console().print(message, style="dim", soft_wrap=True)

    def warning(self, message: str) -> None:
        """Something that works but may surprise."""
        if self.verbosity >= 0 and not self.as_json:
            self.console().print(f"warning: {message}", style="yellow", soft_wrap=True)

    def error(self, error: Mapping[str, Any], text: str) -> None:
        """Why the command ended; `error` with --json, else `text`."""
        if self.as_json and not self.process:
            self._write_json({"schema": "hybridize/error/1", "error": dict(error)})
            return
        console = self.console()
        console.print(f"error in process {self.process}:" if self.process else "error:", style="bold red", end=" ")
        console.print(text, soft_wrap=True)

    def traceback(self, text: str) -> None:
        """For --debug."""
        self.console().print(text, soft_wrap=True)

    def reporter(self) -> Reporter:
        """Progress: bars on a terminal, now and then a line otherwise, nothing when quiet."""
        if self.verbosity < 0:
            return SILENT
        from hybridize.cli.reporter import BarReporter, LineReporter

        console = self.console()
        return BarReporter(console) if console.is_terminal and not self.as_json else LineReporter(console)

    def _write_json(self, value: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()


def _raise_broken_pipe() -> None:
    raise BrokenPipeError
