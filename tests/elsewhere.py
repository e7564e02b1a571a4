"""Exports are read back without hybridize in children of one process, which imports torch and transformers once.

`export` starts a new interpreter each time, and what it imports takes it most of its seconds. Each of the children runs
the same script, as isolated, from the same state: torch and transformers imported, hybridize not.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess


class Parent:
    """Stands for the module `subprocess` in `hybridize.model.export`; started by the first export.

    Args:
        folder: for what the children read and write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, command: Sequence[str], *, input: str, capture_output: bool, text: bool, check: bool
    ) -> CompletedProcess[str]:
        """What `subprocess.run` gives."""
        executable, isolated, script, *arguments = command
        assert (executable, isolated, capture_output, text, check) == (sys.executable, "-I", True, True, False)
        stdin, stdout, stderr = (self._folder / name for name in ("stdin", "stdout", "stderr"))
        stdin.write_text(input)
        status = self._ask([script, *arguments], [str(path) for path in (stdin, stdout, stderr)])
        return CompletedProcess(command, status, stdout.read_text(), stderr.read_text())

    def _ask(self, argv: list[str], streams: list[str]) -> int:
        if self._process is None:
            command, pipe = [sys.executable, "-I", __file__], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([argv, streams]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> None:
        if self._process is not None:
            self._process.communicate(timeout=30)


def child(argv: list[str], streams: list[str]) -> int:
    """Runs the script with these arguments and files as its streams; its exit status."""
    for number, (path, flags) in enumerate(
        zip(streams, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_TRUNC] * 2), strict=True)
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    sys.stdin, sys.argv = open(0, encoding="utf-8", closefd=False), argv  # noqa: SIM115 - for as long as the child runs
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    """`[argv, [stdin, stdout, stderr]]` a line -> exit status, a line each; negative: the signal that ended it."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaForCausalLM  # noqa: F401

    for line in sys.stdin:
        argv, streams = json.loads(line)
        process = os.fork()
        if process == 0:
            status = 1
            try:
                status = child(argv, streams)
            finally:
                os._exit(status)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
