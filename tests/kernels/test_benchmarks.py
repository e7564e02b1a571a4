"""The benchmark scripts themselves, at tiny shapes on the CPU: their rows, and the operations that they count."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    common,
    gated_delta_cases,
    gated_delta_peers,
    gated_delta_rule,
    native_sparse_attention,
    native_sparse_cases,
    native_sparse_overlap,
    retained_attention,
    retained_cases,
)
from hybridize_kernels import native_sparse_attention as native_sparse_op
from hybridize_kernels import use_implementation
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


def blocks_seen(case: native_sparse_cases.Case) -> torch.Tensor:
    """bool `[H, T, blocks]` of the first row: what the selected branch lets through; values name their blocks."""
    q, k, v, gates = (x[:1] for x in native_sparse_cases.make_inputs(case, "cpu"))
    blocks = -(-case.T // case.BS)
    v = torch.eye(blocks).repeat_interleave(case.BS, 0)[: case.T, None].expand(1, -1, case.H, -1)
    only_selected = torch.zeros_like(gates)
    only_selected[..., 1] = 1.0
    with use_implementation("reference"):
        out = native_sparse_op(q, k, v, only_selected, block_size=case.BS, num_selected_blocks=case.S, window=case.W)
    return (out[0] > 0).unflatten(1, (case.H, -1)).any(2).transpose(0, 1)


@pytest.mark.parametrize("kind", native_sparse_cases.KINDS)
def test_overlap_is_of_the_blocks_that_the_op_selects(kind):
    case = native_sparse_cases.Case(1, 150, 6, 2, 8, W=20, BS=16, S=5, inputs=kind)
    q, k = (x[0] for x in native_sparse_cases.make_inputs(case, "cpu")[:2])
    chosen = native_sparse_overlap.chosen_blocks(q, k, native_sparse_overlap.Selection(16, 5))
    seen = blocks_seen(case)
    own, block = torch.arange(150)[:, None] // 16, torch.arange(seen.shape[-1])
    forced = (block == 0) | (block == own) | (block == own - 1)
    assert torch.equal(torch.nn.functional.pad(chosen, (0, 1)) | forced, seen)


def test_counts_the_pairs_that_sparse_attention_sees():
    case = native_sparse_cases.Case(2, 150, 6, 2, 8, W=20, BS=16, S=5)
    time = torch.arange(150)
    causal = time <= time[:, None]
    selected = blocks_seen(case)[0].repeat_interleave(16, 1)[:, :150] & causal
    compressed = (time + 1) // 16
    without = (int(selected.sum()) + int(compressed.sum())) * 12
    near = int((causal & (time[:, None] - time < 20)).sum()) * 12
    assert native_sparse_cases.visible_pairs(case, "no window") == without
    assert native_sparse_cases.visible_pairs(case, "sparse") == without + near
    assert native_sparse_cases.visible_pairs(case, "dense") == int(causal.sum()) * 12


def test_lifelike_queries_select_as_a_model_and_gaussian_ones_by_lot(tmp_path):
    report = common.Report("native_sparse_overlap", on_gpu=False, folder=tmp_path)
    native_sparse_overlap.of_cases(
        report, [native_sparse_cases.Case(1, 4096, 6, 2, 64)], native_sparse_cases.KINDS, "cpu"
    )
    ratios = {(row["case"]["inputs"], row["case"]["BQ"]): row["ratio"] for row in report.rows[1:]}
    # SmolLM2-135M at 2048 to 4096: 1.32, 1.70 and 2.16.
    assert ratios["lifelike", 4] == pytest.approx(1.32, abs=0.1)
    assert ratios["lifelike", 16] == pytest.approx(1.7, abs=0.2)
    assert ratios["lifelike", 64] == pytest.approx(2.16, abs=0.3)
    assert ratios["gaussian", 16] > 3


def test_queries_and_keys_are_recorded_as_attention_gets_them():
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with native_sparse_overlap.recording(model) as layers:
            during = model(input_ids=ids).logits
        attention, hidden = model.model.layers[0].self_attn, model.model.embed_tokens(ids)
        x = model.model.layers[0].input_layernorm(hidden)
        q, k = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, ids))
    assert torch.equal(before, during)
    assert len(layers) == 2
    torch.testing.assert_close(layers[0], (q[0].transpose(0, 1), k[0].transpose(0, 1)))
    assert model.config._attn_implementation != "recording"


def native_sparse_rows(folder: Path, cases: str) -> list[dict[str, Any]]:
    native_sparse_attention.main(["--tiny", "--out", str(folder), "--cases", cases])
    files = [folder / f"native_sparse_attention-{name}.jsonl" for name in cases.split(",")]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()[3:]]


def test_native_sparse_attention_gives_rows_without_errors(tmp_path):
    rows = native_sparse_rows(tmp_path, "forward,backward,crossover,decode,overlap")
    assert [row for row in rows if "error" in row] == []
    for pass_ in ("forward", "forward+backward"):
        of_pass = [row for row in rows if row["pass"] == pass_]
        assert {row["impl"] for row in of_pass} == {"ours", "ours, no window", "sdpa-math"}
        assert {row["case"]["inputs"] for row in of_pass} == {"gaussian", "lifelike"}
        assert max(row["rel_error"] for row in of_pass) < 1e-5
        assert all(row["flipped"] == 0 and row["late_error"] < 1e-5 for row in of_pass if row["pattern"] != "dense")
    assert "ours" in {row["impl"] for row in rows if row["pass"] == "decode"}
    assert {row["case"]["inputs"] for row in rows if row["pass"] == "selection"} == {"gaussian", "lifelike"}


def test_an_error_of_native_sparse_attention_is_seen(tmp_path, monkeypatch):
    def wrong(case: native_sparse_cases.Case) -> list[native_sparse_cases.Form]:
        other = replace(case, S=case.S - 1, W=case.W - 1)
        pairs = zip(forms(case), forms(other), strict=True)
        return [replace(form, attend=another.attend) for form, another in pairs]

    forms = native_sparse_cases.forms_of_ours
    monkeypatch.setattr(native_sparse_attention, "forms_of_ours", wrong)
    rows = [row for row in native_sparse_rows(tmp_path, "backward") if row["impl"].startswith("ours")]
    assert len(rows) == 4
    assert all(row["rel_error"] > 1e-3 and row["flipped"] > 0.1 for row in rows)


def test_the_parts_of_native_sparse_attention_are_found():
    case = native_sparse_cases.Case(1, 40, 4, 2, 16, W=20, BS=16, S=4)
    leaves = native_sparse_cases.make_inputs(case, "cpu", gradient=True)
    attend = native_sparse_cases.forms_of_ours(case)[0].attend
    with use_implementation("triton"):
        parts = native_sparse_attention.parts(attend, leaves, backward=True)
    assert {label for label, _ in parts} == {label for label, _ in native_sparse_attention.PARTS.values()}
    with torch.no_grad():
        for _, call in parts:
            call()
