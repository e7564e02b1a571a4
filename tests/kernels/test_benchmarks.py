"""The benchmark scripts themselves, at tiny shapes on the CPU: their rows, and the operations that they count."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    common,
    gated_delta_cases,
    gated_delta_peers,
    gated_delta_rule,
    retained_attention,
    retained_cases,
)
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


def gated_delta_rows(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of the sections, without what each file begins with."""
    gated_delta_rule.main(["--tiny", "--out", str(folder), *arguments])
    files = sorted(folder.iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()[3:]]


def test_the_gated_delta_rule_gives_rows_without_errors(tmp_path):
    rows = gated_delta_rows(tmp_path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        f"gated_delta_rule-{section}.jsonl" for section in ("backward", "decode", "forward", "parts")
    ]
    assert [row for row in rows if "error" in row] == []
    assert all(row["op"] == "gated_delta_rule" for row in rows)


def test_both_passes_of_the_gated_delta_rule_are_right_and_have_their_floor(tmp_path):
    rows = gated_delta_rows(tmp_path, "--cases", "forward,backward")
    found = {(row["impl"], row["pass"], len(row["case"])) for row in rows}
    unpacked, packed = 5, 6
    for sizes in (unpacked, packed):
        assert {name for name, pass_, of in found if (pass_, of) == ("forward", sizes)} == {
            "ours",
            "ours, normalising q and k",
        }
        assert {name for name, pass_, of in found if (pass_, of) == ("forward+backward", sizes)} == {
            "ours",
            "ours, normalising q and k",
            "ours, states recomputed",
        }
    assert len(rows) == 10
    assert max(row["rel_error"] for row in rows) < 1e-5
    assert all(row["bound"] in ("operations", "bytes") and row["floor_ms"] > 0 for row in rows)
    assert all("again_ms" in row for row in rows if row["impl"] == "ours")


def test_an_error_of_the_gated_delta_rule_is_seen(tmp_path, monkeypatch):
    def wrong(case: gated_delta_cases.Case, device: str, **options: Any) -> gated_delta_cases.Rule:
        rule = gated_delta_cases.ours(case, device, **options)
        return lambda q, k, v, log_decay, beta: rule(q, k, v, log_decay, beta) + 0 * beta[..., None] + 0.1 * k.sum()

    monkeypatch.setattr(gated_delta_rule, "ours", wrong)
    rows = gated_delta_rows(tmp_path, "--cases", "backward")
    assert all(row["rel_error"] > 1e-3 for row in rows)
    assert {row["worst"] for row in rows} <= {"output", "gradient of k"}


def test_what_a_pass_needs_at_least():
    case = gated_delta_cases.Case(1, 10, 3, 3, 128)
    tokens_and_heads = 30
    assert gated_delta_cases.operations(case, backward=False) == tokens_and_heads * 163_840
    assert gated_delta_cases.num_bytes(case, backward=False) == tokens_and_heads * 1032
    assert gated_delta_cases.operations(case, backward=True) == tokens_and_heads * (163_840 + 311_296)
    # Forward again as reads (q, k, v, dO and the gates), and five gradients.
    assert gated_delta_cases.num_bytes(case, backward=True) == tokens_and_heads * (2 * 1032 + 776)
    grouped = gated_delta_cases.Case(1, 10, 1, 3, 128)
    shared = 10 * 2 * 4 * 64 * 128  # q kᵀ and k kᵀ once for two of the three
    assert gated_delta_cases.operations(grouped, backward=False) == tokens_and_heads * 163_840 - shared


def test_a_peer_that_raises_is_followed_by_its_stand_in(tmp_path, monkeypatch):
    def refuses(case: gated_delta_cases.Case, device: str) -> gated_delta_cases.Rule:
        raise RuntimeError("not on this GPU")

    stand_in = gated_delta_peers.Peer("stand-in", gated_delta_cases.ours, {"version": "2"}, around=nullcontext)
    peer = gated_delta_peers.Peer("peer", refuses, {}, otherwise=stand_in)
    monkeypatch.setattr(gated_delta_rule, "peers", lambda case, **options: [peer])
    rows = gated_delta_rows(tmp_path, "--cases", "backward")
    of_peers = [row for row in rows if not row["impl"].startswith("ours")]
    assert [row["impl"] for row in of_peers] == ["peer", "stand-in"] * 2
    assert of_peers[0]["error"] == "RuntimeError: not on this GPU"
    assert of_peers[1]["rel_error"] < 1e-5
    assert of_peers[1]["version"] == "2"
    again = [row["impl"] for row in gated_delta_rows(tmp_path, "--cases", "backward", "--no-peers")]
    assert all(name.startswith("ours") for name in again)
