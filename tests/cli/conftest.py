"""A tiny project on disk, and a way to run a command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hybridize.cli.main import run

RECIPE = """\
# A recipe of the tests.
model: {folder}/teacher
layers: F T G F
mixers:
  T: {{mixer: token_eviction, window_tokens: 14, sink_tokens: 2, budget_tokens: 8}}
data:
  train: [text/*.txt]
  held_out: [held/*.txt]
  sequence_tokens: 32
distill:
  lora: {{rank: 2}}
  precision: float32
  stages:
    - {{name: align, kind: align, steps: 1, learning_rate: 1e-2}}
    - {{name: distill, kind: distill, steps: 1, learning_rate: 1e-2}}
export: {{dtype: float32}}
evaluate:
  precision: float32
  context_tokens: 64
  perplexity: {{context_tokens: 32, max_windows: 1, position_edges: [0, 16]}}
  agreement: {{context_tokens: 32, max_windows: 1}}
  recall: null
  samples: {{prompts: [the sea], new_tokens: 4}}
"""


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as one JSON object."""
        found: dict[str, Any] = json.loads(self.out)
        return found


Invoke = Callable[..., Result]


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str]) -> Invoke:
    """Runs `hybridize ARGUMENTS...`."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(scope="session", autouse=True)
def quick_exports(exports_read_by_children: None) -> None:
    """Of every test here that does not ask for another way."""


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher, texts and recipe.yaml. Tests write elsewhere."""
    from tests.distillation.runs import write_teacher, write_texts

    folder = tmp_path_factory.mktemp("project")
    write_teacher(folder)
    write_texts(folder)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def recipe(project: Path) -> Path:
    """The recipe of the project."""
    return project / "recipe.yaml"


@pytest.fixture(scope="session")
def finished(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that went all the way."""
    out = tmp_path_factory.mktemp("runs") / "one"
    assert run(["-q", "run", str(project / "recipe.yaml"), "--out", str(out)]) == 0
    return out
