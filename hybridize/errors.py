"""The error tree: what users can meet, with an exit code each (design: what is wrong, where, what to do)."""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_RECIPE = 3
EXIT_CHECKPOINT = 4
EXIT_RESOURCE = 5
EXIT_NUMBERS = 6
EXIT_VERIFICATION = 7
EXIT_STOPPED_SAVED = 75
EXIT_INTERRUPTED = 130


class HybridizeError(Exception):
    """A mistake or condition the user can act on.

    Args:
        what: one sentence: what is wrong.
        where: a file, ``file:line``, tensor or recipe key, shown before the sentence.
        hint: what to do about it.
    """

    exit_code: ClassVar[int] = EXIT_BUG
    default_hint: ClassVar[str] = ""

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint or self.default_hint

    def __str__(self) -> str:
        sentence = f"{self.where}: {self.what}" if self.where else self.what
        return f"{sentence} {self.hint}".rstrip()


class UsageError(HybridizeError):
    """The command line asks for something that cannot be (an existing output folder, two exclusive options)."""

    exit_code = EXIT_USAGE


class RecipeError(HybridizeError):
    """A recipe cannot be read or does not fit the model. `problems` lists every fault found, one line each."""

    exit_code = EXIT_RECIPE

    def __init__(self, what: str, *, where: str = "", hint: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(what, where=where, hint=hint)
        self.problems = problems


class CheckpointError(HybridizeError):
    """A checkpoint is missing, damaged, hostile or incomplete."""

    exit_code = EXIT_CHECKPOINT


class FamilyError(CheckpointError):
    """The model belongs to a family, or has a feature, that hybridize does not convert."""


class ResourceError(HybridizeError):
    """Not enough memory, disk, file handles or GPU."""

    exit_code = EXIT_RESOURCE


class NumbersError(HybridizeError):
    """A loss, gradient or weight is not finite."""

    exit_code = EXIT_NUMBERS


class VerificationError(HybridizeError):
    """What was written does not read back as it should, or a quality gate failed."""

    exit_code = EXIT_VERIFICATION


class StoppedError(HybridizeError):
    """A signal ended the run after its state was saved; the same command goes on."""

    exit_code = EXIT_STOPPED_SAVED
    default_hint = "Run the same command again to go on."


class ProcessLostError(StoppedError):
    """One of several processes ended or no longer answers; the others end too, and the same command goes on."""

    default_hint = "The messages of the other processes may say why. Run the same command again to go on."


class InterruptedError_(HybridizeError):
    """A signal ended the run before anything was worth saving."""

    exit_code = EXIT_INTERRUPTED


MET_BY_ALL = (UsageError, RecipeError, CheckpointError, StoppedError, InterruptedError_)
"""Of several processes of a run, each meets these; the first one tells them."""
