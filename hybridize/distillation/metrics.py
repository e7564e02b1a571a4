"""metrics.jsonl: one JSON object a logged step, in step order, each step once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hybridize.checkpoint import resource_errors


class MetricsFile:
    """Appends steps; what was written past the step a run resumes at is cut off first.

    Args:
        path: the file.
        resume_step: last step that stays.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        with resource_errors(path):
            self._cut(resume_step)
            self._file = path.open("a", encoding="utf-8")

    def _cut(self, resume_step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= resume_step]
        temporary = self.path.with_name(self.path.name + ".partial")
        with temporary.open("w", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in kept))
            file.flush()
            os.fsync(file.fileno())  # the rows of a checkpoint are on the disk since before it was
        os.replace(temporary, self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a step; `row["step"]` is its number."""
        with resource_errors(self.path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Makes what was written durable; before a checkpoint of that step is."""
        with resource_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    """The step of a line; infinity for one that was cut off while it was written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
