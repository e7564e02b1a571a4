from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from hybridize.errors import ResourceError, UsageError
from hybridize.report.render import render
from hybridize.report.results import read_metrics, read_results
from tests.report.synthetic import fail_probe, make_results

CHARTS = [
    "kept",
    "recall",
    "perplexity",
    "continuation",
    "state-bytes",
    "recall-state-bytes",
    "ablation",
    "baselines-perplexity",
    "baselines-recall",
]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"stage": stage, "step": step, "stage_step": step - first + 1, "loss": 10.0 / step, "tokens_per_s": 50.0}
        for stage, first in (("align", 1), ("distill", 21))
        for step in range(first, first + 20)
    ]
    rows.append({"stage": "distill", "step": 41, "stage_step": 21, "loss": float("nan")})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "distill", "st')
    return path


def test_a_report_is_a_text_a_page_and_the_charts_of_the_text(tmp_path: Path, metrics: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(make_results()))
    written = render(file, tmp_path / "report", metrics)
    names = ["report.md", "report.html", *(f"{name}.svg" for name in [*CHARTS, "loss-1", "loss-2"])]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(names)
    text, page = (path.read_text() for path in written[:2])
    assert text.startswith("# demo\n")
    assert re.findall(r"\]\((.*?\.svg)\)", text) == names[2:]
    assert "| align | 20 |" in text
    assert "~" not in text + page
    for path in written[2:]:
        chart = ET.parse(path).getroot()
        title = chart.find("{http://www.w3.org/2000/svg}title")
        assert title is not None
        assert title.text in page.replace("&#x27;", "'")


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (render(make_results(), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_probes_that_are_missing_leave_their_charts_out(tmp_path: Path) -> None:
    results = make_results()
    for name in ("recall", "ablation", "baselines", "continuation", "reading", "choices"):
        fail_probe(results, name)
    del results["probes"]["perplexity"]
    written = render(results, tmp_path)
    assert [path.name for path in written] == ["report.md", "report.html", "state-bytes.svg"]


def test_a_report_needs_no_torch_and_no_extras(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(make_results()))
    code = (
        "import sys, pathlib\n"
        "from hybridize.report.render import render\n"
        "render(pathlib.Path(sys.argv[1]) / 'results.json', pathlib.Path(sys.argv[1]) / 'report')\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))\n"
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
        ('{"schema": "hybridize/results/1", "probes": {}}', "this release reads"),
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
    assert {name: len(rows) for name, rows in stages.items()} == {"align": 20, "distill": 21}
