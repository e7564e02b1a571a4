"""Tables and charts of `hybridize bench`'s rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridize.report.inference import tables, write_inference
from hybridize.report.inference_charts import figures
from hybridize.report.inference_rows import milliseconds, read_rows

MACHINE = {"device": "a GPU", "torch": "2.11", "triton": "3.6", "versions": {"cuda": "13.0"}, "dtype": "bfloat16"}


def row(impl: str, name: str, context: int, ms: float | None, *, batch: int = 1, **more: Any) -> dict[str, Any]:
    base = {"impl": impl, "case": {"B": batch, "context": context}, "pass": name}
    if ms is None:
        return {**base, "error": "out of memory", **more}
    times = {"ms": ms, "again_ms": ms * 1.2, "tokens_per_s": batch * 1e3 / ms}
    return {**base, **times, "peak_bytes": 2**30, "state_bytes": 2**20, **more}


ROWS = [
    row("hybrid", "prefill", 1024, 10.0),
    row("teacher, cuDNN", "prefill", 1024, 20.0),
    row("hybrid", "decode", 1024, 1.0),
    row("teacher, cuDNN", "decode", 1024, 2.0),
    row("teacher, flash", "decode", 1024, 1.5),
    row("hybrid", "decode", 131072, 1.0),
    row("teacher, cuDNN", "decode", 131072, 9.0),
    row("teacher, flash", "decode", 131072, None),
]


def by_title(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {table.title: table for table in tables(rows)}


def test_times_are_beside_each_other() -> None:
    table = by_title(ROWS)["Decode, one step of all sequences"]
    assert table.header == (
        *("sequences × context", "hybrid", "teacher, cuDNN", "teacher, flash", "fastest teacher : hybrid"),
    )
    assert list(table.rows) == [
        ("1 × 1k", "1.1", "2.2", "1.65", "× 1.50"),
        ("1 × 128k", "1.1", "9.9", "out of memory", "× 9.00"),
    ]
    assert milliseconds({"ms": 3.0}) == 3.0
    assert milliseconds({"error": "out of memory"}) is None


def test_memory_has_its_tables() -> None:
    found = by_title(ROWS)
    assert found["State bytes of one sequence"].rows[1] == ("128k", "1.0 MiB", "1.0 MiB", "-")
    assert found["Peak memory of prefill"].rows == [("1 × 1k", "1.0 GiB", "1.0 GiB", "-")]
    on_cpu = [{**one, "peak_bytes": None} for one in ROWS]
    assert not [title for title in by_title(on_cpu) if "Peak" in title]


def test_a_model_alone_is_compared_with_nothing() -> None:
    table = tables([ROWS[2]])[0]
    assert table.header == ("sequences × context", "hybrid")


def test_charts_need_two_contexts() -> None:
    names = [figure.name for figure in figures(ROWS)]
    assert names == ["decode-1", "state-bytes"]
    picture = figures(ROWS)[0].svg
    for words in ("teacher, flash", "milliseconds a token", "128k"):
        assert words in picture


def test_largest_batches_and_sections() -> None:
    rows = [
        row("hybrid", "largest", 8192, 4.0, batch=700, attempts=5, section="llama-batch"),
        row("teacher, cuDNN", "largest", 8192, None, section="llama-batch"),
        row("hybrid", "decode", 8192, 1.0, section="smol-decode"),
        row("hybrid", "decode", 1024, 1.0, section="smol-decode"),
    ]
    found = by_title(rows)
    table = found["llama-batch: Largest batch that memory holds"]
    assert table.header == ("context", "hybrid", "teacher, cuDNN")
    assert table.rows == [("8k", "700, 175,000 tokens/s", "out of memory")]
    assert "smol-decode: Decode, one step of all sequences" in found
    assert [figure.name for figure in figures(rows)] == ["smol-decode-decode-1", "smol-decode-state-bytes"]


def test_a_long_text_is_thinned_and_drawn_whole() -> None:
    rows = [row("hybrid", "chunk", 8192 * (n + 1), 5.0) for n in range(128)]
    table = tables(rows)[0]
    assert len(table.rows) == 9
    assert table.rows[-1][0] == "1 × 1024k"
    (figure,) = figures(rows)
    assert len(figure.svg.split('points="')[1].split('"')[0].split()) == 128


def test_files(tmp_path: Path) -> None:
    written = write_inference(MACHINE, ROWS, tmp_path / "new" / "folder")
    assert sorted(path.name for path in written) == ["decode-1.svg", "results.jsonl", "state-bytes.svg", "table.md"]
    assert read_rows(tmp_path / "new" / "folder" / "results.jsonl") == ROWS
    text = (tmp_path / "new" / "folder" / "table.md").read_text()
    assert "| 1 × 1k | 1.1 | 2.2 | 1.65 | × 1.50 |" in text
    assert "![decode, batch 1](decode-1.svg)" in text
    assert "Measured on a GPU, bfloat16; torch 2.11, triton 3.6, cuda 13.0." in text
    assert all("xmlns" in path.read_text() for path in written if path.suffix == ".svg")
