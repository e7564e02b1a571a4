"""The bridge to lm-eval on tiny models, with tasks whose data are local files."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hybridize.errors import UsageError
from hybridize.evaluation.harness import _metrics, harness
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from hybridize.progress import SILENT
from hybridize.recipe.probes import HarnessProbe
from tests.evaluation.conftest import VOCABULARY
from tests.tiny import tiny_teacher

pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")

CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""

WRITING_TASK = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    words = ["river", "stone", "garden", "king", "trees", "ring"]
    rows = [
        {"question": f"the old {words[i % 6]} walked{' slowly' * (i % 3)}", "choices": words[:3], "answer": i % 3}
        for i in range(6)
    ]
    data = folder / "rows.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    for name, text in (("choice", CHOICE_TASK), ("writing", WRITING_TASK)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    broken = CHOICE_TASK.replace("DATA", str(folder / "nowhere.json")).replace("tiny_choice", "tiny_broken")
    (folder / "broken.yaml").write_text(broken)
    return folder


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index holds the folder's tasks alone: looking through those of lm-eval takes seconds."""
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def hybrid() -> Any:
    layers = [
        {"mixer": "gated_delta_net"},
        {"mixer": "token_eviction", "window_tokens": 8, "sink_tokens": 1, "budget_tokens": 4},
        {"mixer": "sliding_window", "window_tokens": 4, "sink_tokens": 1},
        {"mixer": "native_sparse_attention"},
    ]
    return swap(tiny_teacher(vocab_size=VOCABULARY), [config_from_dict(layer) for layer in layers])


def run(models: dict[str, Any], tokenizer: Any, folder: Path, *tasks: str, **settings: Any) -> dict[str, Any]:
    probe = HarnessProbe(tasks=tasks, include_path=str(folder), limit=settings.pop("limit", None))
    with SILENT.task("", None) as task:
        return harness(models, tokenizer, probe, task=task, **settings)


def test_a_hybrid_and_its_teacher_answer_both_kinds_of_tasks(
    hybrid: Any, teacher: Any, tokenizer: Any, tasks_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    row = run({"student": hybrid, "teacher": teacher}, tokenizer, tasks_folder, "tiny_choice", "tiny_writing")
    assert capfd.readouterr() == ("", "")
    assert set(row["tasks"]) == {"tiny_choice", "tiny_writing"}
    assert set(row["tasks"]["tiny_choice"]) == {"acc", "acc_norm"}
    for cell in row["tasks"]["tiny_choice"].values():
        assert set(cell) == {"student", "student_se", "teacher", "teacher_se"}
        assert cell["student"] * 6 == pytest.approx(round(cell["student"] * 6))
        assert 0 <= cell["teacher_se"] < 0.5
    assert row["tasks"]["tiny_writing"]["exact_match"]["student"] == 0
    assert row["limit"] is None
    json.dumps(row, allow_nan=False)


@pytest.mark.usefixtures("few_tasks")
def test_padded_batches_of_a_hybrid_change_nothing(hybrid: Any, tokenizer: Any, tasks_folder: Path) -> None:
    models = {"student": hybrid}
    alone = run(models, tokenizer, tasks_folder, "tiny_choice", batch_size=1)
    together = run(models, tokenizer, tasks_folder, "tiny_choice", batch_size=4)
    assert alone == together
    assert alone["tasks"]["tiny_choice"]["acc"]["teacher"] is None


@pytest.mark.usefixtures("few_tasks")
def test_bad_tasks_are_named(hybrid: Any, tokenizer: Any, tasks_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no task 'tiny_chioce'.*tiny_choice"):
        run({"student": hybrid}, tokenizer, tasks_folder, "tiny_chioce")
    with pytest.raises(UsageError, match="'tiny_broken' cannot be loaded") as caught:
        run({"student": hybrid}, tokenizer, tasks_folder, "tiny_broken")
    assert "offline" in caught.value.hint


def test_without_lm_eval_the_command_to_install_it_is_told(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r'pip install "hybridize\[harness\]"'):
        run({}, tokenizer, Path(), "tiny_choice")


def test_metrics_with_filters_and_without_standard_errors() -> None:
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 1,
        "exact_match_stderr,strict": "N/A",
        "perplexity,none": float("inf"),
    }
    assert _metrics(values) == {"acc": (0.5, 0.1), "exact_match,strict": (1.0, None)}
