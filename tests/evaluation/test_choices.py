"""Multiple choice: likelihoods against a slow loop, the row, and the forms that questions are read from."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize.errors import HybridizeError
from hybridize.evaluation.choices import Question, choices, choose, log_likelihoods, read_questions
from hybridize.evaluation.choices import _asked as ask_with_answer
from hybridize.evaluation.generation import prompt_ids
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from hybridize.progress import SILENT
from hybridize.recipe.probes import ChoicesProbe
from hybridize.recipe.sources import TextSource
from tests.evaluation.conftest import VOCABULARY
from tests.tiny import tiny_teacher

QUESTIONS = [
    Question("kings", "The old king walked slowly under", ("tall trees", "a stone", "his lost silver ring"), 1),
    Question("kings", "A quiet river and", ("the garden", "trees, and trees, and looked for his ring"), 0),
    Question("rings", "The ring was", ("silver", "lost", "öde", "old"), 2),
    Question("rings", "A", ("stone", "river"), 0),
]


@pytest.fixture(scope="module")
def hybrid() -> Any:
    layers = [
        {"mixer": "gated_delta_net"},
        {"mixer": "token_eviction", "window_tokens": 8, "sink_tokens": 1, "budget_tokens": 2},
        {"mixer": "sliding_window", "window_tokens": 4, "sink_tokens": 1},
        {"mixer": "native_sparse_attention"},
    ]
    return swap(tiny_teacher(vocab_size=VOCABULARY), [config_from_dict(layer) for layer in layers])


def slowly(model: Any, tokenizer: Any, prompt: str, text: str) -> float:
    """Σ log p of the text's tokens, one sequence at a time and the whole logits."""
    head = prompt_ids(tokenizer, prompt)
    tokens = prompt_ids(tokenizer, f"{prompt} {text}")
    assert tokens[: len(head)] == head
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    return sum(float(log_p[i - 1, tokens[i]]) for i in range(len(head), len(tokens)))


@pytest.mark.parametrize("name", ["teacher", "hybrid"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_padded_batches_choose_as_a_slow_loop_does(
    name: str, batch_tokens: int, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    expected = []
    for question in QUESTIONS:
        values = [slowly(model, tokenizer, question.prompt, text) / len(text.encode()) for text in question.choices]
        expected.append(values.index(max(values)))
    with SILENT.task("", None) as task:
        assert choose(model, tokenizer, QUESTIONS, batch_tokens=batch_tokens, task=task) == expected


@pytest.mark.parametrize("name", ["teacher", "hybrid"])
def test_log_likelihoods_of_a_padded_batch_are_those_of_a_slow_loop(
    name: str, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    pairs = [(question.prompt, text) for question in QUESTIONS for text in question.choices]
    with torch.inference_mode():
        found = log_likelihoods(model, tokenizer, [ask_with_answer(tokenizer, *pair) for pair in pairs])
    expected = [slowly(model, tokenizer, *pair) for pair in pairs]
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) < 0


def test_length_is_counted_in_bytes(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(model: Any, tokenizer: Any, asked: Any) -> list[float]:
        return [-6.0 if "ö" in tokenizer.decode(one.tokens) else -4.0 for one in asked]

    monkeypatch.setattr("hybridize.evaluation.choices.log_likelihoods", fixed)
    question = Question("t", "It is", ("ööö", "aaaa"), 0)  # 6 bytes and 4: equal, and the first counts
    with SILENT.task("", None) as task:
        assert choose(None, tokenizer, [question], batch_tokens=1000, task=task) == [0]
    longer = Question("t", "It is", ("ööö", "aaaaa"), 0)
    with SILENT.task("", None) as task:
        assert choose(None, tokenizer, [longer], batch_tokens=1000, task=task) == [1]


def test_the_row_has_tasks_chance_and_equal_choices(teacher: Any, other: Any, tokenizer: Any) -> None:
    with SILENT.task("", None) as task:
        ours = choose(other, tokenizer, QUESTIONS, batch_tokens=99, task=task)
        theirs = choose(teacher, tokenizer, QUESTIONS, batch_tokens=99, task=task)
        row = choices({"student": other, "teacher": teacher}, tokenizer, QUESTIONS, batch_tokens=99, task=task)
        alone = choices({"student": other}, tokenizer, QUESTIONS, batch_tokens=99, task=task)
    right = [choice == question.answer for choice, question in zip(ours, QUESTIONS, strict=True)]
    assert row["student"]["share"] == sum(right) / 4
    assert list(row["tasks"]) == ["kings", "rings"]
    assert row["tasks"]["rings"]["student"]["share"] == sum(right[2:]) / 2
    assert row["tasks"]["kings"]["questions"] == 2
    assert row["tasks"]["kings"]["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    assert row["tasks"]["kings"]["same"]["share"] == sum(same[:2]) / 2
    assert alone["tasks"]["kings"]["same"] is None
    assert alone["kept"] is None
    json.dumps(row, allow_nan=False)


def read(base: Path, *paths: str, seed: int = 0, most: int = 200) -> list[Question]:
    sources = tuple(TextSource(path) for path in paths)
    return read_questions(ChoicesProbe(sources=sources, max_questions=most), base, seed=seed)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "It is", "choices": ["a", "b", "c"], "answer": 1}, 1),
        ({"question": "It is", "options": ["a", "b", "c"], "label": "C"}, 2),
        ({"input": "It is", "choices": ["a", "b", "c"], "gold": "b"}, 1),
        ({"prompt": "It is", "choices": ["x", "y", "z"], "answer": "2"}, 2),
        ({"prompt": "It is", "choices": ["C", "B", "A"], "answer": "A"}, 2),  # a text counts before a letter
        ({"prompt": "It is", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "2"}, 1),
    ],
)
def test_forms_of_rows(tmp_path: Path, row: Any, answer: int) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (question,) = read(tmp_path, "rows.jsonl")
    assert (question.task, question.answer) == ("rows", answer)
    assert "It is" in question.prompt


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x", "choices": ["a", "b"], "answer": 2},
        {"prompt": "x", "choices": ["a", "b"], "answer": -1},
        {"prompt": "x", "choices": ["a", "b"], "answer": "E"},
        {"prompt": "x", "choices": ["a", "b"], "answer": True},
        {"prompt": "x", "choices": ["a"], "answer": 0},
        {"prompt": "x", "choices": "ab", "answer": 0},
        {"choices": ["a", "b"], "answer": 0},
        {"prompt": "x", "choices": ["a", "b"]},
        [],
    ],
)
def test_other_rows_are_refused_with_their_line_and_the_forms(tmp_path: Path, row: Any) -> None:
    good = {"prompt": "x", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}")
    with pytest.raises(HybridizeError) as caught:
        read(tmp_path, "rows.jsonl")
    assert caught.value.where.endswith("rows.jsonl:2")
    assert "choices" in caught.value.hint


TASK = {
    "task_prefix": "Guess.",
    "examples": [
        {"input": "One?", "target_scores": {"yes": 1, "no": 0}},
        {"input": "Both?", "target_scores": {"yes": 1, "no": 1}},
        {"input": "Free?", "target": "yes"},
    ],
}


def test_bigbench_tasks(tmp_path: Path) -> None:
    folder = tmp_path / "guessing"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(TASK))
    (question,) = read(tmp_path, "guessing/task.json")
    assert question.task == "guessing"
    assert question.choices[question.answer] == "yes"
    assert question.prompt.startswith("Guess.\nQ: One?")
    assert question.prompt.endswith("\nA:")
    assert all(f"\n  choice: {choice}" in question.prompt for choice in ("yes", "no"))
    own = {"append_choices_to_input": False, "example_input_prefix": "\nIn: ", "example_output_prefix": "\nOut: "}
    (folder / "task.json").write_text(json.dumps({**TASK, **own}))
    assert read(tmp_path, "guessing/task.json")[0].prompt == "Guess.\nIn: One?\nOut:"


def test_tasks_are_read_from_the_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bb.tar.gz", "w:gz") as archive:
        for name in ("guessing", "reasoning/three_objects", "unused"):
            content = json.dumps(TASK).encode()
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = read(tmp_path, "bb.tar.gz:reasoning/three_objects, guessing")
    assert {question.task for question in found} == {"guessing", "reasoning/three_objects"}
    assert not [path for path in tmp_path.iterdir() if path.name != "bb.tar.gz"]
    with pytest.raises(HybridizeError, match=r"'guesing'.*guessing"):
        read(tmp_path, "bb.tar.gz:guesing")
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    with pytest.raises(HybridizeError, match="cannot be read"):
        read(tmp_path, "bad.tar.gz:guessing")


def test_max_questions_are_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"Number {n} is", "choices": ["a", "b"], "answer": n % 2} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    chosen = read(tmp_path, "rows.jsonl", most=9)
    assert len({question.prompt for question in chosen}) == 9
    assert chosen == read(tmp_path, "rows.jsonl", most=9)
    assert chosen != read(tmp_path, "rows.jsonl", most=9, seed=1)
