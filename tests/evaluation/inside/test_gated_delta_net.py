"""Gates of the gated delta rule against plain sums."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from hybridize.evaluation.inside import gated_delta_net as module
from hybridize.evaluation.inside.gated_delta_net import LONGEST_HALF_LIFE_TOKENS, gates
from hybridize.evaluation.inside.layers import listening
from hybridize.evaluation.windows import Window
from tests.evaluation.inside.hybrids import DELTA, EVICTION, FULL, make_texts, tiny_hybrid


def plain(hybrid: Any, layer: int, windows: list[Window], every: int = 1) -> list[dict[str, float]]:
    """The numbers of each head, token by token."""
    new = hybrid.model.layers[layer].self_attn.new
    inputs: list[torch.Tensor] = []
    with torch.no_grad(), listening(hybrid, {layer: lambda x, rope: inputs.append(x[0, ::every])}):
        for window in windows:
            hybrid(torch.tensor([window.tokens]))
    x = torch.cat(inputs).detach()
    rows = []
    new.requires_grad_(False)
    for head in range(4):
        softplus = [math.log1p(math.exp(float(t @ new.decay.weight[head] + new.decay_bias[head]))) for t in x]
        log_decay = [-math.exp(float(new.decay_rate[head])) * s for s in softplus]
        ceiling = 2.0 if new.config.negative_eigenvalues else 1.0
        beta = [ceiling / (1 + math.exp(-float(t @ new.beta.weight[head] + new.beta.bias[head]))) for t in x]
        gate = torch.sigmoid(x @ new.output_gate.weight.view(4, 8, -1)[head].T)
        rows.append(
            {
                "half_life_tokens": statistics.median_low([math.log(2) / -log_a for log_a in log_decay]),
                "decay": statistics.fmean(math.exp(log_a) for log_a in log_decay),
                "beta": statistics.fmean(beta),
                "output_gate": float(gate.mean()),
            }
        )
    return rows


@pytest.mark.parametrize("changes", [{}, {"negative_eigenvalues": False}])
def test_numbers_are_those_of_the_equations(changes: dict[str, Any]) -> None:
    hybrid = tiny_hybrid(FULL, {**DELTA, **changes}, EVICTION, {**DELTA, **changes})
    windows = make_texts(17, 17, 30)
    row = gates(hybrid, windows, batch_tokens=40)
    assert row is not None
    assert row["tokens"] == 64
    assert [layer["index"] for layer in row["layers"]] == [1, 3]
    for layer in row["layers"]:
        for found, expected in zip(layer["heads"], plain(hybrid, layer["index"], windows), strict=True):
            assert found == pytest.approx(expected, rel=1e-3)


def test_half_lives_start_spread_out_and_the_output_gate_at_one_half() -> None:
    row = gates(tiny_hybrid(DELTA, shaken=0.0), make_texts(20), batch_tokens=99)
    assert row is not None
    heads = row["layers"][0]["heads"]
    assert [head["half_life_tokens"] for head in heads] == pytest.approx([256 ** (i / 3) for i in range(4)], rel=1e-4)
    assert [head["decay"] for head in heads] == pytest.approx([0.5 ** (256 ** (-i / 3)) for i in range(4)], rel=1e-4)
    assert all((head["beta"], head["output_gate"]) == (0.5, 0.5) for head in heads)


def test_heads_that_never_or_always_forget_have_finite_numbers() -> None:
    hybrid = tiny_hybrid({**DELTA, "output_gate": False}, shaken=0.0)
    new = hybrid.model.layers[0].self_attn.new
    with torch.no_grad():
        new.decay_rate.copy_(torch.tensor([-200.0, -30.0, 200.0, 5.0]))
    row = gates(hybrid, make_texts(20), batch_tokens=99)
    assert row is not None
    never, hardly, at_once, quickly = row["layers"][0]["heads"]
    assert never["half_life_tokens"] == hardly["half_life_tokens"] == pytest.approx(LONGEST_HALF_LIFE_TOKENS)
    assert (never["decay"], at_once["half_life_tokens"], at_once["decay"]) == (1.0, 0.0, 0.0)
    assert quickly["half_life_tokens"] == pytest.approx(math.exp(-5), rel=1e-3)
    assert never["output_gate"] is None


def test_of_a_long_text_some_tokens_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", 8)
    hybrid, windows = tiny_hybrid(DELTA, FULL), make_texts(20, 8)
    row = gates(hybrid, windows, batch_tokens=99)
    assert row is not None
    assert row["tokens"] == 7 + 8  # every third of 20
    long_alone = gates(hybrid, windows[:1], batch_tokens=99)
    assert long_alone is not None
    for found, expected in zip(long_alone["layers"][0]["heads"], plain(hybrid, 0, windows[:1], every=3), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_nothing_to_tell_is_none() -> None:
    assert gates(tiny_hybrid(FULL, EVICTION), make_texts(20), batch_tokens=99) is None
