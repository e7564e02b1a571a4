from __future__ import annotations

from typing import Any

import pytest

from hybridize.report.verdict import GROUPS, verdict
from tests.report.synthetic import make_results, make_results_alone, pair


def groups(results: dict[str, Any]) -> dict[str, str]:
    return dict(verdict(results))


def test_what_was_lost_comes_first_in_plain_words() -> None:
    found = groups(make_results())
    assert [*found] == ["Lost", "Not settled", "Kept", "Saved", "Measured"]
    assert "24.00 against the teacher's 20.00: 20.0 ± 1.0 % above it." in found["Lost"]
    assert "hidden in 4k tokens it finds 38.3 %, the teacher 66.7 %: × 0.58 (0.40-0.82)." in found["Lost"]
    assert "documents it finds 30.0 %" in found["Lost"]
    assert "multiple-choice questions it answers 55.0 %" in found["Not settled"]
    assert "hidden in 1k tokens" in found["Kept"]
    assert "1.0 MiB of state instead of 8.0 MiB (12.5 %)" in found["Saved"]
    assert "a step of 2 sequences takes 21.5 ms here, the teacher's 43 ms" in found["Saved"]
    assert set(found) <= set(GROUPS)


@pytest.mark.parametrize(
    ("ratio", "error", "group", "says"),
    [
        (0.9, 0.01, "Kept", "10.0 ± 1.0 % below it"),
        (1.01, 0.01, "Kept", "1.0 ± 1.0 % above it"),
        (1.03, 0.01, "Lost", "3.0 ± 1.0 % above it"),
        (1.03, None, "Lost", "3.0 % above it"),
    ],
)
def test_a_perplexity_within_its_error_is_kept(ratio: float, error: float | None, group: str, says: str) -> None:
    results = make_results()
    results["probes"]["perplexity"] |= {"ratio": ratio, "ratio_se": error}
    assert says in groups(results)[group]


def test_a_teacher_that_finds_nothing_shows_no_loss() -> None:
    results = make_results()
    results["probes"]["recall"]["by_length"] = {"4096": pair(0, 1, 40)}
    found = groups(results)
    assert "the teacher 2.5 %: the teacher finds next to nothing, so this shows no loss" in found["Says nothing"]
    assert "hidden" not in found["Lost"]


def test_a_student_at_chance_is_said_to_guess() -> None:
    results = make_results()
    results["probes"]["choices"] |= pair(52, 160, 200)
    assert "It may be guessing (chance 25.0 %)." in groups(results)["Lost"]


def test_few_questions_settle_nothing() -> None:
    results = make_results()
    results["probes"]["recall"]["by_length"] = {"1024": pair(4, 4, 4)}
    assert "hidden in 1k tokens it finds 100.0 %" in groups(results)["Not settled"]


def test_a_student_alone_is_only_measured() -> None:
    found = groups(make_results_alone())
    assert "Perplexity on held-out text is 24.00 ± 0.50." in found["Measured"]
    assert "hidden in 4k tokens it finds 38.3 % (60 questions)." in found["Measured"]
    assert set(found) == {"Measured", "Saved"}


def test_nothing_measured_nothing_said() -> None:
    results = make_results()
    results["probes"] = {}
    assert verdict(results) == []
