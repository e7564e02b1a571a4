"""Ablation against models that are built with the window from the start, and the model afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from hybridize.evaluation.inside.ablation import ablation
from hybridize.evaluation.inside.substitutes import replaced, windows_instead
from hybridize.evaluation.windows import Window
from hybridize.progress import SILENT
from hybridize.recipe.probes import AblationProbe
from tests.evaluation.conftest import VOCABULARY
from tests.evaluation.inside.hybrids import DELTA, EVICTION, FULL, SPARSE, WINDOW, make_texts, tiny_hybrid
from tests.tiny import tiny_teacher

PROBE = AblationProbe(window_tokens=10)
TEXTS = (40, 40, 33)


class Counting:
    steps = 0.0

    def advance(self, steps: float = 1, **fields: str) -> None:
        self.steps += steps


def ablate(
    student: Any, teacher: Any | None, windows: Sequence[Window], probe: AblationProbe = PROBE, batch_tokens: int = 80
) -> dict[str, Any]:
    with SILENT.task("", None) as task:
        return ablation(student, teacher, windows, probe, batch_tokens=batch_tokens, task=task)


def log_p(model: Any, window: Window) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([window.tokens])).logits[0].double().log_softmax(-1)[:-1]


def kl_sum(teacher: Any, student: Any, window: Window) -> float:
    theirs, ours = log_p(teacher, window), log_p(student, window)
    return float((theirs.exp() * (theirs - ours)).sum())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_numbers_are_those_of_a_model_that_has_the_window(family: str) -> None:
    windows = make_texts(*TEXTS)
    mixers = [EVICTION, DELTA, FULL, {**SPARSE, "compression": "mean"}, WINDOW, DELTA]
    teacher = tiny_hybrid(*[FULL] * 6, family=family, seed=3)
    student = tiny_hybrid(*mixers, family=family)
    row = ablate(student, teacher, windows)
    own = {"mixer": "sliding_window", "window_tokens": 10, "sink_tokens": 4}
    instead = [{**own, "window_tokens": 8, "sink_tokens": 2}, own, own, {**own, "window_tokens": 6}, None, own]
    assert [(r["mixer"], r["layers"]) for r in row["mixers"]] == [
        ("token_eviction", [0]),
        ("gated_delta_net", [1, 5]),
        ("full_attention", [2]),
        ("native_sparse_attention", [3]),
    ]
    assert [r["index"] for r in row["layers"]] == [0, 1, 2, 3, 5]
    tokens = [len(window.tokens) - 1 for window in windows]
    whole = [kl_sum(teacher, student, window) for window in windows]
    assert row["whole"]["kl"] == pytest.approx(sum(whole) / sum(tokens), rel=1e-4)
    assert (row["tokens"], row["windows"], row["window_tokens"]) == (sum(tokens), 3, 10)
    for found in [*row["mixers"], *row["layers"]]:
        cut = found.get("layers") or [found["index"]]
        # The same shaken parameters, then the same window in the same place.
        other = tiny_hybrid(*mixers, family=family)
        plain = tiny_hybrid(*[instead[i] or FULL if i in cut else FULL for i in range(6)], family=family)
        for i in cut:
            other.model.layers[i].self_attn = plain.model.layers[i].self_attn
        kl = [kl_sum(teacher, other, window) for window in windows]
        changes = [a - b for a, b in zip(kl, whole, strict=True)]
        change = sum(changes) / sum(tokens)
        squares = sum((c - change * n) ** 2 for c, n in zip(changes, tokens, strict=True))
        loss = sum(float(cross_entropy(log_p(other, w), torch.tensor(w.tokens[1:]), reduction="sum")) for w in windows)
        assert found["kl"] == pytest.approx(sum(kl) / sum(tokens), rel=1e-4)
        assert found["kl_change"] == pytest.approx(change, rel=1e-3, abs=1e-5)
        assert found["kl_change_se"] == pytest.approx(math.sqrt(3 / 2 * squares) / sum(tokens), rel=1e-3, abs=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(loss / sum(tokens)), rel=1e-4)
        assert abs(found["kl_change"]) > 1e-3


def test_a_branch_that_is_bypassed_changes_nothing() -> None:
    student = tiny_hybrid(DELTA, SPARSE, EVICTION, FULL)
    with torch.no_grad():
        student.model.layers[0].self_attn.o_proj.weight.zero_()
    row = ablate(student, tiny_hybrid(*[FULL] * 4), make_texts(*TEXTS))
    changes = [r["kl_change"] for r in row["layers"]]
    assert changes[0] == row["layers"][0]["kl_change_se"] == 0.0
    assert min(abs(change) for change in changes[1:]) > 1e-3


def test_a_window_over_the_whole_text_is_full_attention() -> None:
    row = ablate(
        tiny_hybrid(FULL, FULL), tiny_hybrid(FULL, FULL, seed=4), make_texts(30, 30), AblationProbe(window_tokens=30)
    )
    for found in [*row["mixers"], *row["layers"]]:
        assert found["kl_change"] == pytest.approx(0.0, abs=1e-5)


def test_eviction_that_keeps_everything_is_worth_what_full_attention_is() -> None:
    keeps_all = {**EVICTION, "window_tokens": 10, "sink_tokens": 4, "budget_tokens": 64, "scorer_bias_init": 9.0}
    windows = make_texts(*TEXTS)
    found = ablate(tiny_hybrid(FULL, keeps_all, shaken=0.0), None, windows)["layers"]
    expected = ablate(tiny_hybrid(FULL, FULL), None, windows)["layers"]
    assert [row["mixer"] for row in found] == ["full_attention", "token_eviction"]
    for row, other in zip(found, expected, strict=True):
        assert row["kl"] == pytest.approx(other["kl"], rel=1e-3)
        assert row["kl"] > 1e-3


def test_without_a_teacher_the_student_itself_is_the_measure() -> None:
    row = ablate(tiny_hybrid(EVICTION, DELTA), None, make_texts(*TEXTS))
    assert row["whole"]["kl"] == 0.0
    assert all(r["kl_change"] == r["kl"] > 0 for r in [*row["mixers"], *row["layers"]])


def test_windows_are_left_out_and_layers_when_not_asked_for() -> None:
    windows = make_texts(20, 20)
    row = ablate(tiny_hybrid(WINDOW, EVICTION), None, windows, AblationProbe(window_tokens=10, layers=False))
    assert [r["layers"] for r in row["mixers"]] == [[1]]
    assert row["layers"] == []
    assert ablate(tiny_hybrid(WINDOW, WINDOW), None, windows)["mixers"] == []


@pytest.mark.parametrize(("own", "left"), [(8, 0), (10, 0), (11, 2), (None, 2)])
def test_a_teacher_whose_own_windows_are_no_wider_has_nothing_to_lose(own: int | None, left: int) -> None:
    model = tiny_teacher("mistral", sliding_window=own, num_hidden_layers=2, vocab_size=VOCABULARY)
    assert len(windows_instead(model, 10)) == left


@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "plain"])
def test_the_model_is_the_same_bit_for_bit_afterwards(hybrid: bool) -> None:
    model: Any = tiny_hybrid(EVICTION, DELTA, SPARSE, FULL) if hybrid else tiny_teacher(vocab_size=VOCABULARY)
    windows = make_texts(*TEXTS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, logits = list(model.named_modules()), log_p(model, windows[0])
    ablate(model, None, windows)
    with suppress(KeyError), replaced(model, windows_instead(model, 4)):
        assert not torch.equal(log_p(model, windows[0]), logits)
        raise KeyError
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [(name, id(module)) for name, module in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert torch.equal(log_p(model, windows[0]), logits)


def test_batches_and_the_order_of_texts_change_nothing() -> None:
    student, teacher, windows = tiny_hybrid(EVICTION, DELTA), tiny_hybrid(FULL, FULL), make_texts(30, 40, 30, 40)
    one = ablate(student, teacher, windows, batch_tokens=1)
    many = ablate(student, teacher, sorted(windows, key=lambda w: len(w.tokens)), batch_tokens=999)
    for a, b in zip(one["mixers"] + one["layers"], many["mixers"] + many["layers"], strict=True):
        assert all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in ("kl", "kl_change", "kl_change_se"))


def test_start_tokens_are_not_scored() -> None:
    student = tiny_hybrid(EVICTION, DELTA)
    assert ablate(student, None, make_texts(20))["tokens"] == 19
    assert ablate(student, None, make_texts(20, num_prefix=3))["tokens"] == 17


def test_one_window_has_no_error_and_progress_ends_at_the_number_of_windows() -> None:
    row = ablate(tiny_hybrid(EVICTION, DELTA), None, make_texts(20))
    assert all(r["kl_se"] is None and r["kl_change_se"] is None for r in row["mixers"])
    task = Counting()
    ablation(tiny_hybrid(EVICTION, DELTA), None, make_texts(20, 20, 9), PROBE, batch_tokens=40, task=task)
    assert task.steps == pytest.approx(3)
