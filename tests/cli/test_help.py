"""Help: quick, without torch, and as written down in help.txt."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybridize.cli.main import SECTIONS
from hybridize.cli.shipped import shipped_recipes
from tests.cli.conftest import Invoke

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [name for names in SECTIONS.values() for name in names]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in COMMANDS)], ids=lambda value: " ".join(value) or "group"
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from hybridize.cli.main import run\n"
        f"assert run([*{arguments!r}, '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'peft', 'datasets'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: hybridize" in done.stdout
    assert done.stderr == ""


def test_group_help_is_the_snapshot(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a wanted change: `COLUMNS=80 hybridize --help > tests/cli/help.txt`."""
    monkeypatch.setenv("COLUMNS", "80")
    assert invoke("--help").out == (Path(__file__).parent / "help.txt").read_text(encoding="utf-8")


def test_no_arguments_show_the_help(invoke: Invoke) -> None:
    assert invoke() == invoke("--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_and_the_global_options(invoke: Invoke, name: str) -> None:
    text = invoke(name, "-h").out
    assert "Examples:" in text
    assert f"hybridize {name}" in text.split("Examples:")[1]
    if name != "recipes":
        assert all(option in text for option in ("--json", "--quiet", "--offline", "--debug", "--no-color"))


def test_recipes_of_the_examples_are_shipped() -> None:
    names = set()
    for command in (importlib.import_module(f"hybridize.cli.commands.{name}").command for name in COMMANDS):
        for part in (command, *getattr(command, "commands", {}).values()):
            names |= {word for example in part.examples for word in example.split() if re.search(r"\w--\w", word)}
    assert names
    assert names <= set(shipped_recipes())


def test_version(invoke: Invoke) -> None:
    assert "0.1.0" in invoke("--version").out


def test_completion_script_sources_in_bash(invoke: Invoke, tmp_path: Path) -> None:
    script = tmp_path / "complete.sh"
    script.write_text(invoke("completion", "bash").out)
    done = subprocess.run(
        ["bash", "-euc", f"source {script}; complete -p hybridize"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "_hybridize_completion" in done.stdout


def test_completion_installs(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = Path(invoke("completion", "fish", "--install", "--json").json["path"])
    assert path.is_relative_to(tmp_path)
    assert "hybridize" in path.read_text()


def test_completion_knows_commands_and_recipes() -> None:
    def complete(words: str, position: int) -> str:
        extra = {"_HYBRIDIZE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        command = [sys.executable, "-m", "hybridize"]
        done = subprocess.run(command, env={**ENVIRONMENT, **extra}, capture_output=True, text=True, check=False)
        return done.stdout

    assert "plain,plan" in complete("hybridize pl", 1)
    assert "smollm2-135m--demo" in complete("hybridize plan smol", 2)
