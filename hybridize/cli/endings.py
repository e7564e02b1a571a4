"""How a command ends badly: one message, one exit code, no traceback unless asked for."""

from __future__ import annotations

import errno
import traceback
from functools import partial
from typing import Any

import click

from hybridize.cli.app import Settings
from hybridize.cli.environment import num_processes
from hybridize.cli.several import leave_to_first
from hybridize.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_RESOURCE,
    EXIT_USAGE,
    MET_BY_ALL,
    HybridizeError,
    InterruptedError_,
    ProcessLostError,
    RecipeError,
    ResourceError,
    StoppedError,
    UsageError,
)

_EXHAUSTED = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOMEM,
}
_MEMORY_HINT = (
    "Lower distill.stages.N.batch_sequences (raise accumulate to match), data.sequence_tokens or a probe's "
    "context_tokens, or set distill.gradient_checkpointing: true."
)
_BUG_HINT = "This is a bug in hybridize. Please report it with the lines below and, if you can, the recipe."


def show_ending(error: BaseException, settings: Settings) -> int:
    """Tells the user why the command ended; returns the exit code."""
    error = _reason(error)
    known, code = _as_known(error)
    if settings.output.process and isinstance(known, MET_BY_ALL) and not isinstance(known, ProcessLostError):
        if not isinstance(known, StoppedError | InterruptedError_):  # those are nothing that one alone could meet
            leave_to_first(partial(_tell, error, settings))
        return code
    _tell(error, settings)
    return code


def _tell(error: BaseException, settings: Settings) -> None:
    known, code = _as_known(error)
    output = settings.output
    if settings.debug:
        output.traceback("".join(traceback.format_exception(error)))
    record: dict[str, Any] = {
        "type": type(known or error).__name__,
        "exit_code": code,
        "message": known.what if known else f"{type(error).__name__}: {error}",
        "where": known.where if known else "",
        "hint": known.hint if known else _BUG_HINT,
    }
    if isinstance(known, RecipeError):
        record["problems"] = list(known.problems)
    if known is None:
        from hybridize.cli.environment import short_environment

        record["environment"] = short_environment()
        record["at"] = _last_frame(error)
    output.error(record, _text(record))


def show_loss(error: ProcessLostError, settings: Settings) -> None:
    """The same in another thread, when the main one is blocked for good and the process about to be ended."""
    settings.output.console().show_cursor()  # a bar hides it
    show_ending(error, settings)


def _reason(error: BaseException) -> BaseException:
    """Of several processes, the error that this one was ending with when the launcher's signal interrupted that.

    The launcher signals all others once the first of them has ended.
    """
    earlier = error.__context__
    while isinstance(error, KeyboardInterrupt | click.Abort) and num_processes() > 1 and earlier is not None:
        if isinstance(earlier, HybridizeError):
            return earlier
        earlier = earlier.__context__
    return error


def _as_known(error: BaseException) -> tuple[HybridizeError | None, int]:
    """The error as one of ours, or None for a bug; and the exit code."""
    if isinstance(error, HybridizeError):
        return error, error.exit_code
    if isinstance(error, click.UsageError):
        usage = UsageError(error.format_message(), hint=_usage_hint(error))
        return usage, EXIT_USAGE
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message()), EXIT_USAGE
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return InterruptedError_("interrupted before anything was worth saving."), EXIT_INTERRUPTED
    if is_out_of_memory(error):
        return ResourceError(f"out of memory: {_first_line(error)}", hint=_MEMORY_HINT), EXIT_RESOURCE
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        hint = "Free disk space or permissions, or choose another --out."
        return ResourceError(f"{error.strerror}.", where=str(error.filename or ""), hint=hint), EXIT_RESOURCE
    return None, EXIT_BUG


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the GPU ran out of memory; told by names, because torch may not be imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _usage_hint(error: click.UsageError) -> str:
    command = error.ctx.command_path if error.ctx is not None else "hybridize"
    return f"See `{command} --help`."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _last_frame(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "hybridize" in frame.filename] or list(frames)
    # The name of the file within the package says enough, and nothing of the user's folders.
    return f"{ours[-1].filename.rpartition('hybridize/')[2]}:{ours[-1].lineno}" if ours else ""


def _text(record: dict[str, Any]) -> str:
    first = f"{record['where']}: {record['message']}" if record["where"] else record["message"]
    lines = [first]
    if record["hint"]:
        lines.append(f"  → {record['hint']}")
    if "environment" in record:
        lines += [f"  at {record['at']}", f"  {record['environment']}", "  --debug shows the traceback."]
    return "\n".join(lines)
