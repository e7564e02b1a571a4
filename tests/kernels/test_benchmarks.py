"""The benchmark script itself, at tiny shapes on the CPU: its rows, and the operations that it counts."""

import json

import pytest
import torch

from benchmarks import common, retained_attention, retained_cases
from hybridize_kernels.retained_attention.reference import visible_keys


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("pattern", ["retained", "window", "dense"])
def test_counts_the_pairs_that_are_seen(pattern, capped):
    case = retained_cases.Case(2, 70, 6, 2, 4, W=9, R=5, capped=capped)
    score = retained_cases.make_inputs(case, "cpu")[3]
    positions = torch.arange(70)
    seen = visible_keys(
        score if pattern == "retained" else None,
        positions.expand(2, -1),
        positions[:, None].expand(2, -1, 2),
        window=70 if pattern == "dense" else 9,
        sinks=0,
        budget=case.budget,
    )
    assert retained_cases.visible_pairs(case, score, pattern) == 3 * int(seen.sum())


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_case_gives_rows_without_errors(capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    retained_attention.main(["--tiny", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0].keys() == {"device", "torch", "triton", "versions"}
    assert [row for row in rows if "error" in row] == []
    passes = {row["pass"] for row in rows[1:] if row["impl"] == "ours"}
    assert passes >= {"forward", "forward+backward", "decode", "training step", "log-sum-exp", "largest and sum"}
    assert {"flex", "torch", "ours, scorer and all"} < {row["impl"] for row in rows[1:]}
    errors = [row["rel_error"] for row in rows if "rel_error" in row]
    assert len(errors) > 8
    assert max(errors) < 1e-5
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("{")] == out.read_text().splitlines()
    assert printed.splitlines()[-len(rows)].startswith("impl")


def test_an_error_costs_one_row(capsys, tmp_path):
    report = common.Report("op", on_gpu=False, out=tmp_path / "deeper" / "rows.jsonl")
    with report.guarded("peer", "forward", {"T": 1}):
        raise RuntimeError("no such shape\nwith a long story")
    report.add("ours", "forward", {"T": 1}, ms=0.123456)
    report.finish()
    rows = [json.loads(line) for line in (tmp_path / "deeper" / "rows.jsonl").read_text().splitlines()]
    assert rows[1]["error"] == "RuntimeError: no such shape"
    assert rows[2]["ms"] == 0.1235
    assert "no such shape" in capsys.readouterr().out.splitlines()[-2]
