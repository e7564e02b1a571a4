"""`hybridize bench`, on a hybrid that was converted and never trained: speed does not depend on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hybridize.cli.bench_view import counts
from hybridize.cli.main import run
from hybridize.errors import UsageError
from tests.cli.conftest import Invoke

ONE_CASE = ("--context", "24", "--batch", "2")


@pytest.fixture(scope="module")
def hybrid(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "hybrid"
    assert run(["-q", "convert", str(recipe), "--out", str(out)]) == 0
    return out


def test_finds_the_teacher_and_writes_what_it_shows(invoke: Invoke, hybrid: Path, tmp_path: Path) -> None:
    out = tmp_path / "speed"
    result = invoke("bench", hybrid, "--context", "24,1k", "--batch", "2,1", "--out", out, "--dtype", "float32")
    assert result.code == 0, result.err
    header = next(line for line in result.out.splitlines() if "sequences × context" in line)
    for name in ("hybrid", "teacher, torch", "teacher, engine", "fastest teacher : hybrid"):
        assert name in header
    assert "2 × 1k" in result.out
    assert "State bytes of one sequence" in result.out
    assert "is timed at up to 1,024" in result.err
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines[0]["dtype"] == "float32"
    assert len(lines) == 1 + 2 * 2 * 3 * 2  # contexts, batches, implementations, passes
    names = {path.name for path in out.iterdir()}
    assert names >= {"table.md", "decode-1.svg", "decode-2.svg", "prefill-1.svg", "state-bytes.svg"}
    table = (out / "table.md").read_text()
    assert "![decode, batch 2](decode-2.svg)" in table
    assert f"Measured on {lines[0]['device']}" in table


def test_json_has_the_rows(invoke: Invoke, hybrid: Path, project: Path) -> None:
    result = invoke("bench", hybrid, *ONE_CASE, "--no-engine-teacher", "--teacher", project / "teacher", "--json")
    assert result.code == 0
    values = result.json
    assert values["schema"] == "hybridize/bench/1"
    assert [(row["impl"], row["pass"]) for row in values["rows"]] == [
        *(("hybrid", "prefill"), ("hybrid", "decode")),
        *(("teacher, torch", "prefill"), ("teacher, torch", "decode")),
    ]
    assert values["rows"][0]["case"] == {"B": 2, "context": 24}
    assert values["files"] == []


def test_a_model_alone(invoke: Invoke, hybrid: Path, project: Path) -> None:
    for arguments in ((hybrid, "--alone"), (project / "teacher",)):
        rows = invoke("bench", *arguments, *ONE_CASE, "--json").json["rows"]
        assert len({row["impl"] for row in rows}) == 1


def test_a_teacher_that_has_gone_is_told(invoke: Invoke, recipe: Path, project: Path, tmp_path: Path) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "hybrid"
    shutil.copytree(project / "teacher", teacher)
    assert invoke("convert", recipe, "--model", teacher, "--out", out).code == 0
    shutil.rmtree(teacher)
    result = invoke("bench", out, *ONE_CASE)
    assert result.code == 0, result.err
    assert "Measured alone" in result.err
    assert "teacher" not in result.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--context", "1k,x"), "'x' is not a positive whole number"),
        (("--context", "1"), "nothing to decode from"),
        (("--batch", "0"), "--batch"),
        (("--chunk-tokens", "1k,2k"), "more than one"),
        (("--alone", "--teacher", "y"), "exclude"),
    ],
)
def test_usage_errors(invoke: Invoke, arguments: tuple[str, ...], says: str) -> None:
    result = invoke("bench", "nothing", *arguments)
    assert result.code == 2
    assert says in result.err


def test_a_missing_model_is_a_checkpoint_error(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("bench", tmp_path / "nothing").code == 4


def test_counts() -> None:
    assert counts("8k, 512,1K,1m,512", "--context") == (512, 1024, 8192, 2**20)
    with pytest.raises(UsageError, match="--batch"):
        counts("-1", "--batch")
