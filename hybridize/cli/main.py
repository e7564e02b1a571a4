"""`hybridize`: the group, and what becomes of every way a command can end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import click

from hybridize import __version__
from hybridize.cli.app import LazyGroup, Settings, global_options
from hybridize.cli.endings import show_ending
from hybridize.cli.several import leave, undisturbed_by_launcher

SECTIONS = {
    "The whole way": ("run",),
    "Step by step": ("corpus", "choose", "plan", "convert", "distill", "export", "eval", "report"),
    "Look at a model": ("generate", "bench", "inspect", "verify"),
    "Help": ("recipes", "env", "completion"),
}

root = LazyGroup(
    "hybridize",
    sections=SECTIONS,
    package="hybridize.cli.commands",
    help="Convert pretrained Transformers into hybrids and distil them.",
    params=[*global_options(), *click.version_option(__version__)(lambda: None).__click_params__],  # type: ignore[attr-defined]
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "auto_envvar_prefix": None},
    subcommand_metavar="COMMAND ...",
    examples=(
        "hybridize recipes ls                                     the recipes that come with it",
        "hybridize plan smollm2-135m--demo                        what would happen, and what it costs",
        "hybridize run smollm2-135m--demo --out runs/demo         everything; again to go on after a stop",
        "hybridize generate runs/demo/export --prompt 'The sea'   talk to the result",
    ),
)


def run(arguments: Sequence[str]) -> int:
    """Runs a command line (without the program's name) and returns the exit code."""
    # Options are read left to right; an error before --json must still be told in JSON.
    plain = [text for text in arguments if text.startswith("-")]
    settings = Settings(as_json="--json" in plain, debug="--debug" in plain)
    try:
        code = root.main(list(arguments), prog_name="hybridize", standalone_mode=False, obj=settings)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit:
        raise  # it was said elsewhere: shell completion, or the first of several processes
    except BaseException as error:
        with undisturbed_by_launcher():
            return show_ending(error, settings)


def main() -> None:
    """The console script. SIGTERM ends a command as Ctrl-C does: what is half written is removed.

    (The distillation has its own answer to both, which saves the state.)
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = run(sys.argv[1:])
    except SystemExit as error:  # of several processes, the first one told why
        if not isinstance(error.code, int):
            raise
        code = error.code
    leave(code)
