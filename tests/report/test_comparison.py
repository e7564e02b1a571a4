from __future__ import annotations

from pathlib import Path

import pytest

from hybridize.cli.main import run
from hybridize.errors import UsageError
from hybridize.report.names import distinct_names
from hybridize.report.render import render_comparison
from tests.report.html import Page
from tests.report.synthetic import fail_probe, make_results, make_results_alone, pair


def compared(tmp_path: Path, *results: object) -> str:
    written = render_comparison(results, tmp_path)  # type: ignore[arg-type]
    assert Page(written[1].read_text()).problems == []
    return written[0].read_text()


def test_three_models_stand_beside_each_other(tmp_path: Path) -> None:
    first, second, third = (make_results(name) for name in ("one", "two", "three"))
    second["probes"]["perplexity"]["ratio"] = 1.0625
    second["probes"]["recall"]["by_length"]["2048"] = pair(5, 10, 10)
    third["probes"]["state_bytes"]["ratio"] = 0.4375
    fail_probe(third, "reading")
    text = compared(tmp_path, first, second, third)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    header = rows["model"].split(" | ")
    assert header.index("recall, 1k") < header.index("recall, 2k") < header.index("recall, 4k |".strip(" |"))
    assert "× 1.200 ± 0.010" in rows["one"]
    assert "× 1.062 ± 0.010" in rows["two"]
    assert "× 0.50 (0.24-0.85)" in rows["two"]
    assert "× 0.438 at 8k" in rows["three"]
    assert rows["three"].split(" | ")[header.index("reading")] == "-"
    assert "**No reading.** Not measured in three." in text
    assert "**Alike.**" in text
    assert {path.name for path in tmp_path.glob("*.svg")} == {"recall-state-bytes.svg", "perplexity-state-bytes.svg"}


def test_what_was_measured_in_another_way_is_said(tmp_path: Path) -> None:
    first, second = make_results("one"), make_results("two")
    made = second["provenance"]
    made["seed"] = 7
    made["settings"]["recall"]["lengths"] = [2048]
    made["settings"]["batch_tokens"] = 9
    made["documents"][0]["sha256"] = "c" * 64
    second["teacher"]["fingerprint"] = "e" * 64
    text = compared(tmp_path, first, second)
    assert "not measured in the same way: teacher, held-out texts, seed, recall.lengths." in text
    assert "| recall.lengths | 1024, 4096 | 2048 |" in text
    assert "| seed | 0 | 7 |" in text
    assert "batch" not in text


def test_one_teacher_under_two_names_is_one_teacher(tmp_path: Path) -> None:
    first, second = make_results(), make_results()
    second["teacher"]["spec"] = "another/name.gguf"
    assert "the numbers can be compared" in compared(tmp_path, first, second)


def test_a_model_without_teacher_shows_its_own_shares(tmp_path: Path) -> None:
    text = compared(tmp_path, make_results("one"), make_results_alone())
    line = next(line for line in text.splitlines() if line.startswith("| demo |") and "24.00" in line)
    assert "38.3 % (27-51 %)" in line
    assert "teacher" in text.split("same way:")[1].split(".")[0]


def test_a_teacher_that_finds_nothing_gives_no_ratio(tmp_path: Path) -> None:
    first, second = make_results("one"), make_results("two")
    second["probes"]["recall"]["by_length"]["4096"] = pair(1, 1, 20)
    assert "the teacher finds next to nothing" in compared(tmp_path, first, second)


def test_names_tell_models_apart() -> None:
    specs = ["~/a/demo/export", "~/b/demo/export", "~/other"]
    assert distinct_names([{"spec": spec} for spec in specs]) == ["a/demo/export", "b/demo/export", "other"]
    assert distinct_names([{"spec": "x/demo"}, {"spec": "x/demo"}]) == ["demo (1)", "demo (2)"]


def test_the_command_compares_folders_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "results.json").write_text(json.dumps(make_results("one")))
    (tmp_path / "b.json").write_text(json.dumps(make_results("two")))
    assert run(["report", str(tmp_path / "a"), str(tmp_path / "b.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.html").is_file()
    assert "comparison.md" in capsys.readouterr().out
    assert run(["report", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report" / "report.html").is_file()
    assert "recall in 4k tokens" in capsys.readouterr().out
    assert run(["report", str(tmp_path / "a"), str(tmp_path / "none")]) == 2


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not results"):
        render_comparison([make_results(), {}], tmp_path)
