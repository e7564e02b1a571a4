"""What the README tells people to type, run and write is what there is."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from hybridize.cli.app import Settings
from hybridize.cli.main import root
from hybridize.cli.shipped import find_recipe
from hybridize.mixers.registry import config_class
from hybridize.recipe.reader import load_recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


def lines_of(program: str) -> list[str]:
    """Command lines in the blocks without a language, those in drawings left out; a backslash joins two lines."""
    lines = [line for block in blocks(README, "") for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if line.startswith(f"{program} ")]


def parsed(line: str) -> click.Context:
    """The context of the command that the line means, parsed and not run."""
    words = shlex.split(line, comments=True)[1:]
    # With the group's own settings: click keeps the help option of a command as it was first asked for.
    context = click.Context(root, info_name="hybridize", obj=Settings(), **root.context_settings)
    while isinstance(context.command, click.Group):
        name, command, words = context.command.resolve_command(context, words)
        assert command is not None
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=name, parent=context)
        else:
            context = command.make_context(name, words, parent=context)
    return context


def check_command(line: str) -> None:
    """Raises if the line would not be understood or names a recipe that is not shipped."""
    params = parsed(line).params
    recipes = [params[key] for key in ("recipe_name", "name") if params.get(key)]
    assert all(find_recipe(name).is_file() for name in recipes)


@pytest.mark.parametrize("line", lines_of("hybridize"))
def test_command_is_understood(line: str) -> None:
    check_command(line)


def test_the_commands_are_found() -> None:
    assert {parsed(line).info_name for line in lines_of("hybridize")} >= {"ls", "plan", "run", "generate"}


@pytest.mark.parametrize(
    "line",
    [
        "hybridize fly",
        "hybridize plan",
        "hybridize plan no-such-recipe",
        "hybridize run smollm2-135m--demo --out x --no-such-option",
        "hybridize recipes shw smollm2-135m--demo",
    ],
)
def test_wrong_command_is_seen(line: str) -> None:
    with pytest.raises(Exception, match=r"No such|Missing|no shipped recipe"):
        check_command(line)


@pytest.mark.parametrize("line", lines_of("make"))
def test_target_is_in_the_makefile(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (target,) = shlex.split(line, comments=True)[1:]
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("code", blocks(README, "python"), ids=["engine", "elsewhere", "python"])
def test_python_compiles_and_its_imports_are_there(code: str) -> None:
    tree = ast.parse(code)
    compile(tree, "README.md", "exec")
    names = [
        (node.module, alias.name) for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert names
    for module, name in names:
        assert hasattr(importlib.import_module(str(module)), name), f"{module}.{name}"


def test_python_names_a_recipe_that_is_shipped() -> None:
    (name,) = re.findall(r'load_recipe\("([^"]+)"\)', blocks(README, "python")[-1])
    assert load_recipe(ROOT / name, mixer_configs=config_class).model


def test_recipe_loads_with_either_way_to_say_layers(tmp_path: Path) -> None:
    whole, rules = blocks(README, "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(whole, encoding="utf-8")
    recipe = load_recipe(path, mixer_configs=config_class)
    assert recipe.layers.pattern == "T T F T T G"
    assert recipe.distill is not None
    path.write_text(yaml.safe_dump(yaml.safe_load(whole) | yaml.safe_load(rules)), encoding="utf-8")
    assert len(load_recipe(path, mixer_configs=config_class).layers.rules) == 3
