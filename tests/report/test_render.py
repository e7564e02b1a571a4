from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybridize.errors import ResourceError, UsageError
from hybridize.report import render as render_module
from hybridize.report.plots import smooth
from hybridize.report.render import render
from hybridize.report.results import read_metrics, read_results
from tests.report.synthetic import fail_probe, make_results


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    rows = [
        {"stage": stage, "step": step, "stage_step": step - first + 1, "loss": 10.0 / step, "tokens_per_s": 50.0}
        for stage, first in (("align", 1), ("distill", 21))
        for step in range(first, first + 20)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "distill", "st')
    return path


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_report_is_a_text_and_its_plots(tmp_path: Path, metrics: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(make_results()))
    written = render(file, tmp_path / "report", metrics)
    names = ["report.md", "perplexity.png", "recall.png", "state-bytes.png", "training.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(names)
    for path in written[1:]:
        assert min(png_size(path)) > 300
        assert path.stat().st_size > 5000
    text = written[0].read_text()
    assert text.startswith("# demo\n")
    assert all(f"]({name})" in text for name in names[1:])
    assert "## Training" in text
    assert "| align | 20 |" in text
    assert "~" not in text


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (render(make_results(), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_probes_that_are_missing_leave_their_plot_out(tmp_path: Path) -> None:
    results = make_results()
    fail_probe(results, "recall")
    del results["probes"]["perplexity"]
    assert [path.name for path in render(results, tmp_path)] == ["report.md", "state-bytes.png"]


def test_plots_of_a_student_alone(tmp_path: Path) -> None:
    results = make_results()
    results["teacher"] = results["probes"]["recall"]["teacher"] = None
    for row in results["probes"]["perplexity"]["by_position"]:
        row |= dict.fromkeys(("teacher", "teacher_se", "ratio", "ratio_se"))
    for parts in results["probes"]["recall"]["by_length"].values():
        parts["teacher"] = None
    height = png_size(render(make_results(), tmp_path)[2])[1]
    assert png_size(render(results, tmp_path)[2])[1] < height * 0.7


def test_without_matplotlib_there_is_a_text_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module, "has_matplotlib", lambda: False)
    (written,) = render(make_results(), tmp_path)
    text = written.read_text()
    assert "matplotlib is not installed" in text
    assert "![" not in text
    assert "| perplexity on held-out text |" in text


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(make_results()))
    code = (
        "import sys, pathlib\n"
        "from hybridize.report.render import render\n"
        "render(pathlib.Path(sys.argv[1]) / 'results.json', pathlib.Path(sys.argv[1]) / 'report')\n"
        "print(sorted({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))\n"
    )
    command, root = [sys.executable, "-c", code, str(tmp_path)], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[1]", "not results"),
        ('{"schema": "else"}', "not results"),
        ('{"schema": "hybridize/results/2", "probes": {}}', "this release reads"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=says) as error:
        read_results(path)
    assert str(path) in str(error.value)
    assert error.value.hint


def test_a_folder_that_cannot_be_written_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="disk is full"):
        render(make_results(), tmp_path / "report")
    assert list((tmp_path / "report").iterdir()) == []


def test_metrics_are_parted_by_stage_and_a_cut_line_is_left_out(metrics: Path) -> None:
    stages = read_metrics(metrics)
    assert {name: len(rows) for name, rows in stages.items()} == {"align": 20, "distill": 20}


def test_smoothing_keeps_a_level_and_the_length() -> None:
    assert smooth([2.0] * 30) == [2.0] * 30
    assert smooth([0.0, 3.0, 0.0]) == [1.5, 1.0, 1.5]
