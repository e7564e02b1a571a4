from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize.evaluation import probes as probes_module
from hybridize.evaluation.probes import Probes, is_out_of_memory
from hybridize.evaluation.results import failed_probes
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from hybridize.recipe.documents import Document
from hybridize.recipe.probes import (
    AblationProbe,
    AgreementProbe,
    BaselinesProbe,
    ChoicesProbe,
    ContinuationProbe,
    Evaluate,
    HarnessProbe,
    InsideProbe,
    PerplexityProbe,
    RecallProbe,
    SamplesProbe,
    SpeedProbe,
)
from hybridize.recipe.sources import TextSource
from tests.evaluation.conftest import VOCABULARY
from tests.tiny import tiny_teacher

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
    assert "batch_tokens" in rows["perplexity"]["hint"]
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
    assert list(rows["recall"]["tasks"]) == ["niah_single_1"]
    assert rows["recall"]["left_out"] == ["niah_single_2", "niah_single_3"]
    prose_only = replace(SMALL, recall=replace(SMALL.recall, tasks=("niah_single_2",)))
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


EVERYTHING = Evaluate(
    context_tokens=1024,
    batch_tokens=2048,
    perplexity=SMALL.perplexity,
    agreement=SMALL.agreement,
    recall=SMALL.recall,
    continuation=ContinuationProbe(prompt_tokens=20, prompts=3, new_tokens=4),
    ablation=AblationProbe(context_tokens=64, max_windows=1, window_tokens=12),
    inside=InsideProbe(context_tokens=450, max_windows=1, shown_tokens=60),
    baselines=BaselinesProbe(
        policies=("recency", "last_attention"),
        budgets=(8, 16),
        tasks=("niah_single_1",),
        lengths=(450,),
        depths=(0.5,),
        samples=1,
        context_tokens=64,
        max_windows=1,
    ),
    speed=SpeedProbe(lengths=(16,), new_tokens=2, repeats=1),
    samples=SMALL.samples,
)


@pytest.fixture(scope="module")
def hybrid() -> Any:
    configs = (
        {"mixer": "token_eviction", "window_tokens": 16, "budget_tokens": 12},
        {"mixer": "gated_delta_net"},
        {"mixer": "native_sparse_attention", "block_tokens": 4, "selected_blocks": 3, "window_tokens": 12},
    )
    model = tiny_teacher(vocab_size=VOCABULARY, num_hidden_layers=3, max_position_embeddings=1024)
    return swap(model, [config_from_dict(dict(config)) for config in configs])


def test_every_probe_of_a_hybrid_gives_plain_finite_numbers(
    hybrid: Any, tokenizer: Any, documents: list[Document]
) -> None:
    teacher = tiny_teacher(vocab_size=VOCABULARY, num_hidden_layers=3, max_position_embeddings=1024)
    rows = run(hybrid, teacher, tokenizer, documents, EVERYTHING)
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(rows, "ok")
    assert set(rows) == {
        "state_bytes", "speed", "perplexity", "agreement", "recall", "continuation", "ablation", "inside", "baselines",
        "samples",
    }  # fmt: skip
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [layer["mixer"] for layer in rows["ablation"]["layers"]] == [
        "token_eviction",
        "gated_delta_net",
        "native_sparse_attention",
    ]
    assert all(rows["inside"][part] is not None for part in ("retention", "needles", "gates", "selection", "shown"))
    policies = [(row["policy"], row["budget"]) for row in rows["baselines"]["rows"]]
    assert {("full", None), ("recency", 8), ("last_attention", 16), ("learned", 8), ("learned", 16)} <= set(policies)


def test_probes_of_mixers_have_nothing_to_say_of_a_plain_model(
    teacher: Any, tokenizer: Any, documents: list[Document]
) -> None:
    rows = run(teacher, teacher, tokenizer, documents, replace(EVERYTHING, recall=None, speed=None, samples=None))
    assert {rows[name]["status"] for name in ("ablation", "inside", "baselines")} == {"skipped"}
    rows = run(teacher, None, tokenizer, documents, replace(EVERYTHING, recall=None, speed=None, samples=None))
    assert {rows[name]["status"] for name in ("continuation", "baselines")} == {"skipped"}


def test_probes_that_need_a_source_say_so(teacher: Any, tokenizer: Any) -> None:
    nothing = Evaluate(perplexity=None, recall=None, agreement=None, samples=None)
    rows = run(teacher, None, tokenizer, [], replace(nothing, choices=ChoicesProbe(), harness=HarnessProbe()))
    assert "sources" in rows["choices"]["error"]
    assert "tasks" in rows["harness"]["error"]


def test_a_haystack_of_ones_own(teacher: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "hay.txt").write_text("Straw is dry and light. " * 40)
    settings = replace(SMALL, recall=replace(SMALL.recall, tasks=("niah_single_2",), haystack=(TextSource("hay.txt"),)))
    probes = Probes(teacher, None, tokenizer, settings, [], base=tmp_path)
    assert probes.run()["recall"]["status"] == "ok"
    assert probes._haystack(settings.recall) == ["Straw is dry and light. " * 40]
