"""How scores of items become the row of the probe."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hybridize.evaluation.items import Item
from hybridize.evaluation.recall import gather, recall
from hybridize.evaluation.tasks import make_items
from hybridize.progress import SILENT
from hybridize.recipe.documents import Document
from hybridize.recipe.probes import RecallProbe
from tests.evaluation.scripted import Scripted


def reader(tokenizer: Any, reach: float = 1.0) -> Scripted:
    """Finds a needle in the first `reach` of its prompt."""

    def answer(prompt: str) -> str:
        found = re.search(r"is: (\S+)\.", prompt[: int(len(prompt) * reach)])
        return f" {found[1]}" if found else " a riddle"

    return Scripted(tokenizer, answer)


def test_hits_are_counted_by_task_length_and_depth(tokenizer: Any, documents: list[Document]) -> None:
    settings = RecallProbe(lengths=(500, 700), depths=(0.1, 0.9), samples=2)
    items = make_items(settings, tokenizer, [document.text for document in documents], seed=0)
    models = {"student": reader(tokenizer, 0.5), "teacher": reader(tokenizer)}
    with SILENT.task("", None) as task:
        row = recall(models, tokenizer, items, batch_tokens=4000, task=task)
    assert (row["teacher"]["share"], row["teacher"]["samples"]) == (1.0, 24)
    assert row["student"]["share"] == 0.5
    assert row["kept"]["value"] == 0.5
    assert list(row["tasks"]) == ["niah_single_1", "niah_single_2", "niah_single_3"]
    for lengths in row["tasks"].values():
        assert list(lengths) == ["500", "700"]
        for tokens, cell in lengths.items():
            assert cell["student"]["share"] == 0.5
            cells = [(d["depth"], d["student"]["share"], d["student"]["samples"]) for d in cell["depths"]]
            assert cells == [(0.1, 1.0, 2), (0.9, 0.0, 2)]
            assert cell["prompt_tokens"] == [int(tokens), int(tokens)]
    assert row["by_length"]["500"]["student"]["samples"] == 12
    assert row["student"]["low"] < 0.5 < row["student"]["high"]


def test_parts_of_answers_count_in_part() -> None:
    items = [Item("niah_multivalue", (1, 2), ("a",), 1, 2) for _ in range(4)]
    row = gather(items, {"student": [0.25, 0.5, 0.0, 0.25], "teacher": [1.0, 1.0, 0.5, 0.5]})
    assert row["student"]["share"] == 0.25
    assert row["kept"]["value"] == pytest.approx(1 / 3)
    assert row["tasks"]["niah_multivalue"]["2"]["depths"] == []


def test_nothing_is_kept_of_nothing() -> None:
    items = [Item("t", (1,), ("a",), 1, 1)] * 3
    assert gather(items, {"student": [0.0] * 3, "teacher": [0.0] * 3})["kept"] is None
    assert gather(items, {"student": [1.0] * 3})["teacher"] is None
