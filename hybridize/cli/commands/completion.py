"""hybridize completion."""

from __future__ import annotations

from pathlib import Path

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make

_PLACES = {
    "bash": ".local/share/bash-completion/completions/hybridize",
    "zsh": ".zfunc/_hybridize",
    "fish": ".config/fish/completions/hybridize.fish",
}


@make(
    name="completion",
    examples=("hybridize completion bash --install", 'eval "$(hybridize completion zsh)"'),
)
@click.argument("shell", type=click.Choice(sorted(_PLACES)))
@click.option("--install", is_flag=True, help="Write it where the shell looks for it.")
def command(settings: Settings, shell: str, install: bool) -> None:
    """Print or install the completion script of a shell."""
    from click.shell_completion import get_completion_class

    from hybridize.cli.main import root

    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"No completion for {shell}.")
    script = found(root, {}, "hybridize", "_HYBRIDIZE_COMPLETE").source()
    if not install:
        settings.output.result("completion", {"shell": shell, "script": script}, [script])
        return
    path = Path.home() / _PLACES[shell]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    advice = " (add ~/.zfunc to fpath before compinit)" if shell == "zsh" else ""
    settings.output.result("completion", {"shell": shell, "path": str(path)}, [f"{path}{advice}"])
