from __future__ import annotations

from typing import Any

import pytest

from hybridize.errors import UsageError, VerificationError
from hybridize.evaluation.gates import gate, parse_condition

RESULTS: dict[str, Any] = {
    "probes": {
        "perplexity": {"status": "ok", "ratio": 1.2, "ratio_se": None, "by_position": [{"ratio": 1.1}, {"ratio": 1.4}]},
        "recall": {"status": "ok", "kinds": {"niah_single_1": {"1024": {"student": {"share": 0.9}}}}},
        "agreement": {"status": "failed", "error": "out of memory"},
    }
}


def test_conditions_that_hold_pass() -> None:
    gate(
        RESULTS,
        "perplexity.ratio<=1.5",
        "perplexity.ratio<=1.2",
        "perplexity.ratio == 1.2",
        " recall.kinds.niah_single_1.1024.student.share >= 9e-1 ",
        "perplexity.by_position.1.ratio>1.3",
        "perplexity.ratio!=-1",
    )


@pytest.mark.parametrize("condition", ["perplexity.ratio<1.2", "perplexity.ratio<=1.19", "perplexity.ratio>1.2"])
def test_a_condition_that_does_not_hold_is_named_with_its_value(condition: str) -> None:
    with pytest.raises(VerificationError) as error:
        gate(RESULTS, "perplexity.ratio<=1.5", condition)
    assert error.value.exit_code == 7
    assert f"1 of 2 gates do not hold: {condition} (it is 1.2)" in str(error.value)


def test_every_broken_gate_is_named_and_a_failed_probe_breaks_its_gates() -> None:
    with pytest.raises(VerificationError) as error:
        gate(RESULTS, "perplexity.ratio<1", "agreement.kl<0.1")
    assert "2 of 2" in str(error.value)
    assert "out of memory" in str(error.value)


@pytest.mark.parametrize(
    "condition", ["", "perplexity.ratio", "perplexity.ratio<=", "perplexity.ratio=1", "<=1", "a<=1..2", "a<=nan"]
)
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(UsageError, match="not a condition"):
        parse_condition(condition)


def test_a_path_to_nothing_suggests_what_there_is() -> None:
    with pytest.raises(UsageError) as error:
        gate(RESULTS, "perplexity.ration<=1.5")
    assert "perplexity.ratio" in error.value.hint
    with pytest.raises(UsageError):
        gate(RESULTS, "perplexity.ratio_se<=1")
