"""hybridize corpus, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b"):
        numbers = [" ".join(f"{name}{number}x{place}" for place in range(60)) for number in range(20)]
        (folder / f"{name}.txt").write_text("\0".join(numbers))
    return folder


def test_from_text(invoke: Invoke, project: Path, texts: Path, tmp_path: Path) -> None:
    command = ("corpus", "--text", texts / "a.txt", "--hold-out-source", f"held:{texts / 'b.txt'}")
    result = invoke(*command, "--model", project / "teacher", "--tokens", "4k", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert result.out.splitlines()[0].split()[:2] == ["source", "read"]
    assert set(files(tmp_path / "out")) >= {"train/000.jsonl", "held-out/held.jsonl", "corpus.json", "README.md"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "train" / "000.jsonl").read_text().splitlines()]
    assert all(set(row) == {"text", "id", "source"} and row["source"] == "a" for row in rows)
    again = invoke(*command, "--model", project / "teacher", "--tokens", "4k", "--out", tmp_path / "again", "--json")
    values = again.json
    assert values["schema"] == "hybridize/corpus/1"
    assert values["unit"] == "tokens"
    assert files(tmp_path / "again") == files(tmp_path / "out")
    assert invoke(*command, "--out", tmp_path / "out").code == 2
    assert invoke(*command, "--out", tmp_path / "out", "--overwrite").code == 0


def test_what_falls_short_is_a_warning(invoke: Invoke, project: Path, texts: Path, tmp_path: Path) -> None:
    arguments = ("corpus", "--text", texts / "a.txt", "--model", project / "teacher", "--tokens", "1M")
    result = invoke(*arguments, "--out", tmp_path / "out")
    assert result.code == 0
    assert "warning: a has" in result.err
    assert "--max-repeats" in result.err


def test_from_the_teacher(invoke: Invoke, project: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the sea\n\nof ships\n")
    options = ("--tokens", 600, "--batch", 4, "--sequence-tokens", 40, "--min-tokens", 12, "--dtype", "float32")
    command = ("corpus", "--from-teacher", project / "teacher", *options, "--prompt-file", prompts)
    result = invoke(*command, "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "train" / "teacher.jsonl").read_text().splitlines()]
    assert rows
    assert {row["source"] for row in rows} == {"teacher"}
    assert result.json["options"]["batch"] == 4
    assert result.json["sources"][0]["lengths"]["min"] >= 12
    assert invoke(*command, "--out", tmp_path / "again").code == 0
    assert files(tmp_path / "again") == files(tmp_path / "out")
    assert invoke(*command, "--out", tmp_path / "other", "--seed", 1).code == 0
    assert files(tmp_path / "other")["train/teacher.jsonl"] != files(tmp_path / "out")["train/teacher.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Give --text PATH, or --from-teacher MODEL"),
        (("--text", "x.txt", "--tokens", "3T"), "'3T' is not a number of tokens"),
        (("--text", "x.txt=0"), "is no weight"),
        (("--text", "x.txt", "--tokens", "3k"), "Give --model"),
        (("--text", "x.txt", "--temperature", "2"), "--temperature: needs --from-teacher"),
        (("--from-teacher", "TEACHER", "--text", "x.txt"), "--text: goes with --text, not with --from-teacher"),
        (("--from-teacher", "TEACHER", "--facts", "0.2"), "--facts: goes with --text"),
        (("--from-teacher", "TEACHER"), "Give --tokens"),
        (("--from-teacher", "TEACHER", "--tokens", "9", "--temperature", "0"), "--temperature: must be above 0"),
        (("--from-teacher", "TEACHER", "--tokens", "9"), "must be 2 to 512, the positions of the model"),
        (
            ("--from-teacher", "TEACHER", "--tokens", "9", "--sequence-tokens", "64"),
            "--min-tokens: no text of at most 63 tokens has 64",
        ),
        (
            ("--from-teacher", "TEACHER", "--tokens", "9", "--sequence-tokens", "65"),
            "--min-tokens: none of the 8 texts has 64 tokens",
        ),
        (("--text", "x.txt", "--model", "TEACHER", "--facts", "0.2", "--sequence-tokens", "99"), "too short for facts"),
    ],
)
def test_refusals(invoke: Invoke, project: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    filled = [str(project / "teacher") if argument == "TEACHER" else argument for argument in arguments]
    result = invoke("corpus", *filled, "--out", tmp_path / "out")
    assert result.code == 2, result.err
    assert says in result.err
    assert not any(tmp_path.iterdir())


def test_a_missing_source_is_3(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("corpus", "--text", tmp_path / "none.txt", "--out", tmp_path / "out")
    assert result.code == 3
    assert "No file matches" in result.err


def test_hybrids_do_not_write(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    assert invoke("-q", "convert", recipe, "--out", tmp_path / "hybrid").code == 0
    result = invoke("corpus", "--from-teacher", tmp_path / "hybrid", "--tokens", "10", "--out", tmp_path / "out")
    assert result.code == 2
    assert "a hybrid does not write corpora" in result.err


def test_a_folder_that_holds_something_is_refused_before_the_teacher_is_loaded(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = invoke("corpus", "--from-teacher", tmp_path / "none", "--tokens", "10", "--out", tmp_path)
    assert result.code == 2
    assert "not empty" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
