"""A tiny run that tests may break: prepared once a file, copied for each test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distillation import runs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, texts and a converted checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def reference(prepared: Path) -> Path:
    """The tiny run, left alone."""
    shutil.copytree(prepared / "run", prepared / "reference")
    return runs.again(prepared / "reference")


@pytest.fixture(scope="module")
def serve(prepared: Path, serving: subprocess.Popen[str]) -> runs.Server:
    """Runs in processes of their own."""
    return runs.Server(prepared, serving)


@pytest.fixture
def run(prepared: Path, request: pytest.FixtureRequest) -> Path:
    """A fresh run folder."""
    name = "".join(character if character.isalnum() else "-" for character in request.node.name)
    shutil.copytree(prepared / "run", prepared / name)
    return prepared / name
