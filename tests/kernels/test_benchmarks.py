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
    retained_attention.main(["--tiny", "--out", str(tmp_path / "deeper")])
    files = sorted((tmp_path / "deeper").iterdir())
    assert [file.name for file in files] == [
        f"retained_attention-{case}.jsonl" for case in ("backward", "columns", "decode", "forward", "memory")
    ]
    lines = [file.read_text().splitlines() for file in files]
    head = lines[0][:3]
    assert all(of[:3] == head for of in lines)
    printed = capsys.readouterr().out
    assert {line for line in printed.splitlines() if line.startswith("{")} == {line for of in lines for line in of}
    rows = [json.loads(line) for line in (*head, *(line for of in lines for line in of[3:]))]
    assert rows[0].keys() == {"device", "torch", "triton", "versions"}
    assert [row for row in rows if "error" in row] == []
    passes = {row["pass"] for row in rows[1:] if row["impl"] == "ours"}
    assert passes >= {"forward", "forward+backward", "decode", "training step", "log-sum-exp", "largest and sum"}
    assert {"flex", "torch", "ours, scorer and all"} < {row["impl"] for row in rows[1:]}
    errors = [row["rel_error"] for row in rows if "rel_error" in row]
    assert len(errors) > 8
    assert max(errors) < 1e-5
    assert printed.splitlines()[-len(rows)].startswith("impl")


def test_an_error_costs_one_row_and_an_interruption_none(capsys, tmp_path):
    report = common.Report("op", on_gpu=False, folder=tmp_path)
    file = tmp_path / "op-forward.jsonl"

    def interrupted() -> None:
        with report.section("forward"):
            with report.guarded("peer", "forward", {"T": 1}):
                raise RuntimeError("no such shape\nwith a long story")
            report.add("ours", "forward", {"T": 1}, ms=0.123456)
            assert len(file.read_text().splitlines()) == 3  # as they come
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    report.finish()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[1]["error"] == "RuntimeError: no such shape"
    assert rows[2]["ms"] == 0.1235
    assert "no such shape" in capsys.readouterr().out.splitlines()[-2]
