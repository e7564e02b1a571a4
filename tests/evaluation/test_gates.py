from __future__ import annotations

from typing import Any

import pytest

from hybridize.errors import UsageError, VerificationError
from hybridize.evaluation.cells import pair_cell
from hybridize.evaluation.gates import gate, parse_condition, parse_conditions


def pair(student: int, teacher: int | None) -> dict[str, Any]:
    hits = {"student": student, "teacher": teacher}
    return pair_cell({name: [1.0] * n + [0.0] * (10 - n) for name, n in hits.items() if n is not None})


def recall(teacher: int | None) -> dict[str, Any]:
    tasks = {"niah_single_2": {"4096": pair(4, teacher), "8192": pair(0, None if teacher is None else 0)}}
    return {"status": "ok", **pair(6, teacher), "by_length": {"4096": pair(9, teacher)}, "tasks": tasks}


RESULTS: dict[str, Any] = {
    "probes": {
        "perplexity": {
            "status": "ok",
            "student": 24.0,
            "ratio": 1.2,
            "ratio_se": None,
            "by_position": [{"ratio": 1.1}, {"ratio": 1.4}],
        },
        "recall": recall(teacher=8),
        "reading": {"status": "ok", **pair(3, 6), "sources": {}},
        "choices": {"status": "skipped", "error": "no questions were given"},
        "continuation": {"status": "ok", "same_tokens": 17.5},
        "state_bytes": {"status": "ok", "ratio": 0.125},
        "agreement": {"status": "failed", "error": "out of memory"},
    }
}
ALONE: dict[str, Any] = {"probes": {"recall": recall(teacher=None), "perplexity": {"status": "ok", "ratio": None}}}


def test_conditions_that_hold_pass() -> None:
    gate(
        RESULTS,
        "perplexity.ratio<=1.5",
        "perplexity.ratio<=1.2",
        "perplexity.ratio == 1.2",
        " recall.tasks.niah_single_2.4096.student.share >= 4e-1 ",
        "perplexity.by_position.1.ratio>1.3",
        "perplexity.ratio!=-1",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ppl", 24.0),
        ("ppl_ratio", 1.2),
        ("same_tokens", 17.5),
        ("state_ratio", 0.125),
        ("recall", 0.75),
        ("recall@4096", 1.125),
        ("niah_single_2@4096", 0.5),
        ("reading", 0.5),
    ],
)
def test_short_names_stand_for_numbers(name: str, value: float) -> None:
    gate(RESULTS, f"{name}<={value + 1e-9},{name}>={value - 1e-9}")
    with pytest.raises(VerificationError, match="2 of 2"):
        gate(RESULTS, f"{name}<{value - 1e-9}, {name}>{value + 1e-9}")


@pytest.mark.parametrize(("name", "value"), [("recall", 0.6), ("recall@4096", 0.9), ("niah_single_2@8192", 0.0)])
def test_without_a_teacher_the_students_share_counts(name: str, value: float) -> None:
    gate(ALONE, f"{name}=={value}")


@pytest.mark.parametrize("condition", ["perplexity.ratio<1.2", "perplexity.ratio<=1.19", "ppl_ratio>1.2"])
def test_a_condition_that_does_not_hold_is_named_with_its_value(condition: str) -> None:
    with pytest.raises(VerificationError) as error:
        gate(RESULTS, "perplexity.ratio<=1.5", condition)
    assert error.value.exit_code == 7
    assert f"1 of 2 gates do not hold: {condition} (it is 1.2)" in str(error.value)


@pytest.mark.parametrize(
    ("results", "condition", "why"),
    [
        (RESULTS, "niah_single_2@8192>=0", "the teacher finds nothing there"),
        (ALONE, "ppl_ratio<=2", "there is no teacher"),
        (RESULTS, "perplexity.ratio_se<=1", "it has no value"),
        (RESULTS, "kl<9", "failed, out of memory"),
        (RESULTS, "agreement.kl<9", "failed, out of memory"),
        (RESULTS, "choices>0", "skipped, no questions were given"),
    ],
)
def test_what_has_no_value_does_not_hold_and_says_why(results: dict[str, Any], condition: str, why: str) -> None:
    with pytest.raises(VerificationError, match=why) as error:
        gate(results, condition)
    assert condition in str(error.value)


def test_every_broken_gate_is_named() -> None:
    with pytest.raises(VerificationError) as error:
        gate(RESULTS, "perplexity.ratio<1,recall@4096>=0.9", "recall>=0.9")
    assert "2 of 3 gates do not hold: perplexity.ratio<1 (it is 1.2); recall>=0.9 (it is 0.75)" in str(error.value)


def test_commas_part_conditions() -> None:
    found = parse_conditions(["recall@4096>=0.9, ppl_ratio<=1.05", "kl<1e-1"])
    assert [(c.name, c.sign, c.limit) for c in found] == [
        ("recall@4096", ">=", 0.9),
        ("ppl_ratio", "<=", 1.05),
        ("kl", "<", 0.1),
    ]
    assert parse_conditions(()) == []


@pytest.mark.parametrize(
    "condition", ["", "perplexity.ratio", "perplexity.ratio<=", "perplexity.ratio=1", "<=1", "a<=1..2", "a<=nan"]
)
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(UsageError, match="not a condition"):
        parse_condition(condition)
    with pytest.raises(UsageError, match="not a condition"):
        parse_conditions([f"kl<1,{condition}"])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("perplexity.ration", "perplexity.ratio"),
        ("ppl_ration", "ppl_ratio"),
        ("recall@496", "recall@4096"),
        ("niah_single_1@4096", "niah_single_2@4096"),
        ("perplexity", "perplexity.ratio"),
        ("perplexity.by_position.7.ratio", "perplexity.by_position.1.ratio"),
        ("recall.status", "recall.student.share"),
        ("zzz", "ppl_ratio"),
    ],
)
def test_an_unknown_name_suggests_what_there_is(name: str, near: str) -> None:
    with pytest.raises(UsageError) as error:
        gate(RESULTS, f"{name}<=1.5")
    assert near in error.value.hint
