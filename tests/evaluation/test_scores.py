"""Perplexity and agreement against brute force on whole logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from hybridize.errors import NumbersError
from hybridize.evaluation import scores as scores_module
from hybridize.evaluation.agreement import agreement
from hybridize.evaluation.parts import between
from hybridize.evaluation.perplexity import perplexity
from hybridize.evaluation.scores import WindowScores, score_windows
from hybridize.evaluation.windows import Window, make_windows
from hybridize.progress import SILENT
from hybridize.recipe.documents import Document


def score(student: Any, teacher: Any, windows: list[Window], batch_tokens: int = 1) -> list[WindowScores]:
    with SILENT.task("", None) as task:
        return score_windows(student, teacher, windows, batch_tokens=batch_tokens, task=task)


@pytest.fixture
def windows(tokenizer: Any, documents: list[Document]) -> list[Window]:
    return make_windows(documents, tokenizer, context_tokens=100, max_windows=3)


def whole_logits(model: Any, window: Window) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([window.tokens])).logits[0].double()


def test_scores_equal_brute_force(
    teacher: Any, other: Any, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores_module, "CHUNK_ELEMENTS", 384 * 17)  # chunks that do not divide the window
    for found in score(other, teacher, windows):
        ours, theirs = whole_logits(other, found.window)[:-1], whole_logits(teacher, found.window)[:-1]
        labels = torch.tensor(found.window.tokens[1:])
        assert found.teacher is not None
        assert found.kl is not None
        torch.testing.assert_close(found.student, cross_entropy(ours, labels, reduction="none"), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.teacher, cross_entropy(theirs, labels, reduction="none"), atol=1e-4, rtol=1e-4)
        divergence = kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(found.kl, divergence, atol=1e-4, rtol=1e-4)
        assert found.same_top is not None
        assert torch.equal(found.same_top, (ours.argmax(-1) == theirs.argmax(-1)).double())


def test_batches_and_chunks_change_nothing(
    teacher: Any, other: Any, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = score(other, teacher, windows)
    monkeypatch.setattr(scores_module, "CHUNK_ELEMENTS", 1)
    many = score(other, teacher, windows, batch_tokens=1000)
    assert [s.window for s in one] == [s.window for s in many] == windows
    for first, second in zip(one, many, strict=True):
        torch.testing.assert_close(first.student, second.student, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(first.kl, second.kl, atol=1e-4, rtol=1e-4)


def test_the_teacher_against_itself_loses_nothing(teacher: Any, windows: list[Window]) -> None:
    found = score(teacher, teacher, windows)
    ppl, close = perplexity(found, (0, 16)), agreement(found, (0, 16))
    for row in (ppl, *ppl["by_source"].values(), *ppl["by_position"]):
        assert row["ratio"] == 1.0
        assert row["student"] == row["teacher"] > 1
    assert ppl["ratio_se"] == 0.0
    assert close["kl"] == 0.0
    assert close["top1"] == 1.0


def test_rows_equal_brute_force_over_positions_and_sources(teacher: Any, other: Any, windows: list[Window]) -> None:
    found = score(other, teacher, windows)
    ppl, close = perplexity(found, (0, 16, 50)), agreement(found, (0, 16, 50))
    triples = [
        (position + 1, s.window.source, float(s.student[position]), float(s.teacher[position]), float(s.kl[position]))
        for s in found
        for position in range(len(s.student))
    ]

    def mean(column: int, keep: Any) -> float:
        values = [triple[column] for triple in triples if keep(triple)]
        return math.fsum(values) / len(values)

    assert [(row["from"], row["to"]) for row in ppl["by_position"]] == [(0, 16), (16, 50), (50, 100)]
    for row, kl_row in zip(ppl["by_position"], close["by_position"], strict=True):
        inside = lambda t, row=row: row["from"] <= t[0] < row["to"]  # noqa: E731
        assert row["tokens"] == sum(inside(t) for t in triples) == kl_row["tokens"]
        assert row["student"] == pytest.approx(math.exp(mean(2, inside)))
        assert row["ratio"] == pytest.approx(math.exp(mean(2, inside) - mean(3, inside)))
        assert kl_row["kl"] == pytest.approx(mean(4, inside))
    for source, row in ppl["by_source"].items():
        assert row["teacher"] == pytest.approx(math.exp(mean(3, lambda t, source=source: t[1] == source)))
    assert ppl["tokens"] == len(triples)


def test_start_tokens_are_not_scored() -> None:
    values = torch.arange(5.0, dtype=torch.float64)  # tokens at positions 1 to 5
    plain = WindowScores(Window(tuple(range(6)), "s", "d"), values, None, None, None)
    started = WindowScores(Window(tuple(range(6)), "s", "d", num_prefix=1), values, None, None, None)
    assert between(plain, 0, 6).student.tolist() == [0, 1, 2, 3, 4]
    assert between(started, 0, 6).student.tolist() == [0, 1, 2, 3, 4]  # position 1 follows the start token
    assert between(plain, 2, 4).student.tolist() == [1, 2]
    assert between(plain, 0, 1) is None
    assert between(plain, 6, 9) is None


def test_a_student_alone_has_no_ratio(teacher: Any, windows: list[Window]) -> None:
    row = perplexity(score(teacher, None, windows), (0,))
    assert row["student"] > 1
    assert row["teacher"] is row["ratio"] is row["ratio_se"] is None


def test_logits_that_are_not_finite_are_an_error(windows: list[Window], teacher: Any) -> None:
    import copy

    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(NumbersError, match="not finite") as error:
        score(broken, teacher, windows)
    assert windows[0].document in error.value.where
