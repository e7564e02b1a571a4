"""What the commands share: settings before or after the command, lazy loading, grouped help with examples."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from hybridize.cli.environment import process_number
from hybridize.cli.output import Output


@dataclass
class Settings:
    """The options that every command has."""

    as_json: bool = False
    color: bool | None = None
    verbosity: int = 0
    debug: bool = False
    offline: bool = False
    _output: Output | None = None

    @property
    def output(self) -> Output:
        """The sink, made when the command line has been read."""
        if self._output is None:
            self._output = Output(
                as_json=self.as_json, color=self.color, verbosity=self.verbosity, process=process_number()
            )
        return self._output


def _settings(context: click.Context) -> Settings:
    root = context.find_root()
    if not isinstance(root.obj, Settings):
        root.obj = Settings()
    return root.obj


def _set(name: str, convert: Callable[[Any], Any] = lambda value: value) -> Callable[..., None]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            setattr(_settings(context), name, convert(value))

    return callback


def global_options() -> list[click.Option]:
    """The options that stand before or after the command."""
    shared: dict[str, Any] = {"expose_value": False, "is_eager": True}
    return [
        click.Option(["--json"], is_flag=True, help="One JSON object on stdout.", callback=_set("as_json"), **shared),
        click.Option(["-v", "--verbose"], count=True, help="Say more.", callback=_set("verbosity"), **shared),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            help="Results and errors only.",
            callback=_set("verbosity", lambda _: -1),
            **shared,
        ),
        click.Option(
            ["--no-color"],
            is_flag=True,
            help="No colours (so does NO_COLOR).",
            callback=_set("color", lambda _: False),
            **shared,
        ),
        click.Option(
            ["--offline"],
            is_flag=True,
            help="Never use the network; take Hub files from the cache.",
            callback=_set("offline"),
            **shared,
        ),
        click.Option(
            ["--debug"], is_flag=True, help="Show the traceback of an error.", callback=_set("debug"), **shared
        ),
    ]


class Command(click.Command):
    """A command with the global options, and its examples at the end of the help."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.shared = global_options()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        return [*own[:-1], *self.shared, own[-1]] if ctx.help_option_names else [*own, *self.shared]

    def invoke(self, ctx: click.Context) -> Any:
        _quieten_libraries(_settings(ctx))
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and record[1]:
                (shared if parameter in self.shared or parameter.name == "help" else own).append(record)
        for title, records in (("Options", own), ("Everywhere", shared)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(self.examples, formatter)


def _quieten_libraries(settings: Settings) -> None:
    """Set before any of them is imported: they read the environment once."""
    if settings.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if settings.as_json or settings.verbosity < 0 or process_number():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if settings.verbosity <= 0 and not settings.debug:
        # What one library wants to tell another is no news for the user.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for.

    Args:
        sections: command names by title, in the order of the help.
        package: holds a module of each name, with the command in `command`.
    """

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Sequence[str]],
        package: str,
        examples: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        self.package = package
        self.examples = tuple(examples)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in self.sections.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{self.package}.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            guess = f" Did you mean {near[0]!r}?" if near else f" Commands: {', '.join(self.list_commands(ctx))}."
            ctx.fail(f"No such command {args[0]!r}.{guess}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for name in self.list_commands(ctx))
        for title, names in self.sections.items():
            records = []
            for name in names:
                found = self.get_command(ctx, name)
                if found is not None:
                    records.append((name.ljust(width), found.get_short_help_str(100)))
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(self.examples, formatter)


def _write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


def command(
    *, examples: Sequence[str] = (), name: str | None = None, cls: type[Command] = Command
) -> Callable[[Callable[..., Any]], click.Command]:
    """Makes a command of a function whose first parameter is the `Settings`."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        @click.pass_context
        @functools.wraps(function)
        def call(context: click.Context, /, *args: Any, **kwargs: Any) -> Any:
            return function(_settings(context), *args, **kwargs)

        made: click.Command = click.command(name, cls=cls, examples=examples)(call)
        return made

    return wrap
