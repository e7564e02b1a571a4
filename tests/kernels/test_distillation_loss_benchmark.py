"""The distillation loss's benchmark script at tiny shapes on the CPU."""

import json

from benchmarks import distillation_cases, distillation_loss


def test_every_case_gives_rows_without_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation_loss, "TILES", ["128,4,2,0"])
    monkeypatch.setattr(distillation_loss, "CHUNKS", [1])
    distillation_loss.main(["--tiny", "--cases", "loss,top_k,tiles,chunks", "--out", str(tmp_path)])
    files = {file.stem.removeprefix("distillation_loss-"): file for file in tmp_path.iterdir()}
    assert set(files) == {"loss", "top_k", "tiles", "chunks"}
    rows = {name: [json.loads(line) for line in file.read_text().splitlines()[3:]] for name, file in files.items()}
    assert [row for of in rows.values() for row in of if "error" in row] == []
    assert {row["impl"] for row in rows["loss"]} == {
        *("ours", "ours, again", "ours, eager", "torch, whole logits", "torch, products alone")
    }
    assert {row["case"]["head"] for row in rows["loss"]} == {"frozen", "trained"}
    assert max(row["rel_error"] for row in rows["loss"] if "rel_error" in row) < 1e-5
    assert {row["case"]["k"] for row in rows["top_k"]} == {50}
    assert {row["impl"] for row in rows["tiles"]} == {"full=128,4,2,0"}
    assert {row["impl"] for row in rows["chunks"]} == {"frozen=1;trained=1"}


def test_counts_the_products():
    sizes = 2 * 10 * 3 * 7
    assert distillation_cases.Case(10, 3, 7, "frozen").operations == 3 * sizes
    assert distillation_cases.Case(10, 3, 7, "trained").operations == 4 * sizes
