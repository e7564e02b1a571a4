from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybridize.evaluation import probes as probes_module
from hybridize.evaluation.probes import Probes, is_out_of_memory
from hybridize.evaluation.results import failed_probes
from hybridize.recipe.documents import Document
from hybridize.recipe.probes import AgreementProbe, Evaluate, PerplexityProbe, RecallProbe, SamplesProbe

SMALL = Evaluate(
    context_tokens=1024,
    perplexity=PerplexityProbe(context_tokens=64, max_windows=2, position_edges=(0, 32)),
    agreement=AgreementProbe(context_tokens=64, max_windows=1),
    recall=RecallProbe(lengths=(450,), depths=(0.5,), samples=1),
    samples=SamplesProbe(prompts=("the old",), new_tokens=3),
)


class Listener:
    """A reporter that counts what it is told."""

    def __init__(self) -> None:
        self.totals: dict[str, float | None] = {}
        self.steps: dict[str, float] = {}
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, total: float | None) -> Any:
        self.totals[description] = total

        class Task:
            def advance(_, steps: float = 1, **fields: str) -> None:
                self.steps[description] = self.steps.get(description, 0) + steps

        yield Task()

    def note(self, message: str) -> None:
        self.notes.append(message)


def run(student: Any, teacher: Any, tokenizer: Any, documents: list[Document], settings: Evaluate = SMALL, **more: Any):
    return Probes(student, teacher, tokenizer, settings, documents, **more).run()


def without_seconds(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in rows.items()}


def test_the_teacher_against_itself_has_lost_nothing(teacher: Any, tokenizer: Any, documents: list[Document]) -> None:
    listener = Listener()
    rows = run(teacher, teacher, tokenizer, documents, reporter=listener)
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(
        ("state_bytes", "perplexity", "agreement", "recall", "samples"), "ok"
    )
    assert rows["perplexity"]["ratio"] == 1.0
    assert (rows["agreement"]["kl"], rows["agreement"]["top1"]) == (0.0, 1.0)
    assert rows["recall"]["student"] == rows["recall"]["teacher"]
    (sample,) = rows["samples"]["samples"]
    assert sample["student"] == sample["teacher"]
    assert listener.steps == listener.totals
    assert failed_probes({"probes": rows}) == []


def test_perplexity_and_agreement_share_their_forward_passes(
    teacher: Any, other: Any, tokenizer: Any, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = probes_module.score_windows
    monkeypatch.setattr(probes_module, "score_windows", lambda *a, **k: calls.append(len(a[2])) or real(*a, **k))
    settings = replace(SMALL, recall=None, samples=None)
    rows = run(other, teacher, tokenizer, documents, settings)
    assert calls == [4]
    assert (rows["perplexity"]["windows"], rows["agreement"]["windows"]) == (4, 2)
    apart = replace(settings, agreement=AgreementProbe(context_tokens=32, max_windows=3))
    assert run(other, teacher, tokenizer, documents, apart)["agreement"]["windows"] == 6
    assert calls == [4, 4, 6]


def test_the_same_seed_measures_the_same(teacher: Any, other: Any, tokenizer: Any, documents: list[Document]) -> None:
    first, second = (without_seconds(run(other, teacher, tokenizer, documents, seed=5)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_probe_that_runs_out_of_memory_is_marked_and_the_others_still_run(
    teacher: Any, tokenizer: Any, documents: list[Document], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(probes_module, "score_windows", fail)
    listener = Listener()
    rows = run(teacher, teacher, tokenizer, documents, reporter=listener)
    assert failed_probes({"probes": rows}) == ["perplexity", "agreement"]
    assert "batch_sequences" in rows["perplexity"]["hint"]
    assert rows["recall"]["status"] == rows["samples"]["status"] == "ok"
    assert len(listener.notes) == 2


def test_other_errors_are_not_hidden(
    teacher: Any, tokenizer: Any, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(probes_module, "score_windows", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        run(teacher, teacher, tokenizer, documents)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_without_documents_only_the_noise_is_searched(teacher: Any, tokenizer: Any) -> None:
    rows = run(teacher, teacher, tokenizer, [])
    assert rows["perplexity"]["status"] == rows["agreement"]["status"] == "skipped"
    assert list(rows["recall"]["kinds"]) == ["niah_single_1"]
    assert rows["recall"]["left_out"] == ["niah_single_2", "niah_single_3"]
    prose_only = replace(SMALL, recall=replace(SMALL.recall, kinds=("niah_single_2",)))
    assert run(teacher, teacher, tokenizer, [], prose_only)["recall"]["status"] == "skipped"


def test_without_a_teacher_nothing_is_compared(teacher: Any, tokenizer: Any, documents: list[Document]) -> None:
    rows = run(teacher, None, tokenizer, documents)
    assert rows["perplexity"]["ratio"] is None
    assert rows["agreement"]["status"] == "skipped"
    assert rows["recall"]["teacher"] is None
    assert rows["samples"]["samples"][0]["teacher"] is None
    assert list(rows["state_bytes"]["measured"]) == ["student"]


def test_probes_set_to_null_are_left_out(teacher: Any, tokenizer: Any, documents: list[Document]) -> None:
    nothing = Evaluate(perplexity=None, recall=None, agreement=None, samples=None)
    assert list(run(teacher, teacher, tokenizer, documents, nothing)) == ["state_bytes"]
