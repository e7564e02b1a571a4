from __future__ import annotations

from typing import Any

import pytest

from hybridize.evaluation.state_bytes import bytes_by_layer, state_bytes
from hybridize.families import family
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from tests.tiny import tiny_teacher

FULL = {"mixer": "full_attention"}
PLANS: dict[str, list[dict[str, Any]]] = {
    "gated_delta_net": [{"mixer": "gated_delta_net"}, FULL],
    "sliding_window": [FULL, {"mixer": "sliding_window", "window_tokens": 32, "sink_tokens": 4}],
    "token_eviction": [
        {"mixer": "token_eviction", "window_tokens": 16, "sink_tokens": 2, "budget_tokens": 24},
        {"mixer": "gated_delta_net"},
    ],
}


def configs_of(plan: list[dict[str, Any]]) -> list[MixerConfig]:
    return [config_from_dict(values) for values in plan]


@pytest.mark.parametrize("name", PLANS)
def test_the_measured_cache_is_what_the_configurations_promise(name: str) -> None:
    hybrid = swap(tiny_teacher(num_hidden_layers=2), configs_of(PLANS[name]))
    row = state_bytes({"student": hybrid, "teacher": tiny_teacher(num_hidden_layers=2)}, context_tokens=4096, seed=0)
    for measured in row["measured"].values():
        assert measured["promised"] == measured["measured"]
        assert measured["as_promised"]
    assert row["student"] < row["teacher"]
    assert [layer["mixer"] for layer in row["layers"]] == [values["mixer"] for values in PLANS[name]]
    assert sum(layer["student"] for layer in row["layers"]) == row["student"]


def test_the_teacher_costs_two_keys_and_values_a_token() -> None:
    model = tiny_teacher(num_hidden_layers=2)
    row = state_bytes({"student": model}, context_tokens=4096, seed=0)
    assert row["teacher"] == row["student"] == 4096 * 2 * 2 * 8 * 2 * 2  # T · (k, v) · H · D · bf16 · L
    assert row["ratio"] == 1.0
    assert [r["tokens"] for r in row["by_context"]] == [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    assert row["measured"]["student"]["measured"] == 256 * 2 * 2 * 8 * 4 * 2  # fp32


def test_a_broken_promise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from_dict(PLANS["sliding_window"][1])
    hybrid = swap(tiny_teacher(num_hidden_layers=2), [config, config])
    monkeypatch.setattr(type(config), "state_bytes", lambda *_: 7)
    measured = state_bytes({"student": hybrid}, context_tokens=1024, seed=0)["measured"]["student"]
    assert measured["promised"] == 14
    assert not measured["as_promised"]


def test_a_teacher_with_windows_of_its_own_keeps_no_more() -> None:
    config = {**tiny_teacher("mistral").config.to_dict(), "sliding_window": 100}
    geometry = family("mistral").geometry(config)
    assert set(geometry.windows) == {100}
    plain = configs_of([FULL] * geometry.num_layers)
    assert bytes_by_layer(plain, geometry, 4096, 2) == bytes_by_layer(plain, geometry, 100, 2)
