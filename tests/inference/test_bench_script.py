"""kernels/benchmarks/inference.py at tiny sizes: every section has its rows, and a section alone keeps the others'."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import inference
from benchmarks.inference_models import HALF_LINEAR, LALTE, LTE, MODELS
from hybridize.families import family
from hybridize.inference.bench import clock


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step a number; and tiny states need not be given back at once: to look for them takes most of the time."""
    monkeypatch.setattr(clock, "ON_CPU", clock.Effort(1, 0.0, 1, 0, 0.0, 1))
    monkeypatch.setattr(gc, "collect", lambda *arguments: 0)


def lines(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("hasty")
def test_all_sections_run_and_are_replaced_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inference.main(["--tiny", "--out", str(tmp_path)])
    head, *rows = lines(tmp_path)
    assert head.keys() == {"device", "torch", "triton", "versions", "dtype"}
    assert [row for row in rows if "error" in row] == []
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(inference.SECTIONS)
    assert {row["pass"] for row in rows} == {"prefill", "decode", "largest", "chunk"}
    assert {row["op"] for row in rows} == {"inference"}
    assert {row["case"]["model"] for row in rows} == {"smollm2-135m", "llama-3-8b", "qwen3-1.7b"}
    smol = [row["impl"] for row in rows if row["section"] == "smol-decode"]
    assert set(smol) == {LTE.name, LALTE.name, "teacher, torch", "teacher, engine"}
    printed = capsys.readouterr().out
    assert "### " not in printed
    assert "## million: One long text, chunk by chunk" in printed

    inference.main(["--tiny", "--out", str(tmp_path), "--sections", "million"])
    again = lines(tmp_path)
    others = [row for row in rows if row["section"] != "million"]
    assert again[: 1 + len(others)] == [head, *others]
    assert len(again) == 1 + len(rows)


def test_rows_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "inference-x.jsonl"
    path.write_text(json.dumps({"device": "another"}) + "\n")
    with pytest.raises(SystemExit, match="another"):
        inference.Results(path, {"device": "this one"})


def test_an_error_ends_its_section_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scale: inference.Scale) -> Any:
        yield {"impl": "a", "case": {"B": 1, "context": 8}, "pass": "decode", "ms": 1.23456}
        raise ValueError("no such model")

    monkeypatch.setitem(inference.SECTIONS, "million", ("llama-3-8b", broken))
    first, last = inference.measured_section("million", inference.Scale(True))
    assert first["ms"] == 1.235
    assert last["error"] == "ValueError: no such model"


@pytest.mark.parametrize(
    ("name", "millions"), [("smollm2-135m", 134.5), ("llama-3-8b", 8030.3), ("qwen3-1.7b", 1720.6)]
)
def test_models_have_their_true_sizes(name: str, millions: float) -> None:
    import torch

    config = MODELS[name]
    with torch.device("meta"):
        model = family(config.model_type).base_classes()[2](config)  # type: ignore[call-arg]
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_hybrids_are_those_that_are_named() -> None:
    eviction, linear = "token_eviction", "gated_delta_net"
    layers = LTE.layers(30)
    assert {(c.name, c.window_tokens, c.budget_tokens, c.sink_tokens) for c in layers} == {(eviction, 256, 256, 4)}  # type: ignore[attr-defined]
    assert sum(config.name == linear for config in LALTE.layers(30)) == 15
    names = [config.name for config in HALF_LINEAR.layers(32)]
    assert names == [eviction, linear] * 16
    assert HALF_LINEAR.layers(2)[0].window_tokens + HALF_LINEAR.layers(2)[0].budget_tokens == 1024  # type: ignore[attr-defined]
