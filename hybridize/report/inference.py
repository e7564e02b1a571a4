"""Latency and memory of implementations beside each other: rows of `hybridize bench` as tables and charts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hybridize.checkpoint.resources import resource_errors
from hybridize.files import write_whole
from hybridize.report.charts.style import standalone
from hybridize.report.inference_charts import figures
from hybridize.report.inference_rows import Row, Rows, implementations, milliseconds, sections
from hybridize.report.numbers import ABSENT, rounded, size, tokens
from hybridize.report.tables import Table, markdown

_TITLES = {
    "prefill": "Prefill",
    "decode": "Decode, one step of all sequences",
    "largest": "Largest batch that memory holds",
    "chunk": "One long text, chunk by chunk",
}
_MOST_CHUNKS = 9
"""Lines of a long text's table; the chart has all."""


def write_inference(machine: Row, rows: Rows, out: Path) -> list[Path]:
    """Writes results.jsonl (the machine first), table.md and the charts into a folder.

    Raises:
        ResourceError: disk, quota or permission.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (machine, *rows))
    return _write(out, {"results.jsonl": lines, **_texts(machine, rows)})


def write_tables(machine: Row, rows: Rows, out: Path) -> list[Path]:
    """The same without results.jsonl, for rows that lie in a file already.

    Raises:
        ResourceError: disk, quota or permission.
    """
    return _write(out, _texts(machine, rows))


def _texts(machine: Row, rows: Rows) -> dict[str, str]:
    """table.md and the charts by their names."""
    found = figures(rows)
    pictures = "\n\n".join(f"![{figure.title}]({figure.name}.svg)" for figure in found)
    parts = ["# Latency and memory\n", *(markdown(table) for table in tables(rows)), pictures, _about(machine)]
    return {
        "table.md": "\n".join(part for part in parts if part) + "\n",
        **{f"{figure.name}.svg": standalone(figure.svg) for figure in found},
    }


def _write(out: Path, texts: Mapping[str, str]) -> list[Path]:
    with resource_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        return [write_whole(out / name, text) for name, text in texts.items()]


def tables(rows: Rows) -> list[Table]:
    """Times by pass, then memory; for each section of the rows, if they have sections."""
    found: list[Table] = []
    for section, own in sections(rows):
        before = f"{section}: " if section else ""
        for name, title in _TITLES.items():
            of_pass = [row for row in own if row["pass"] == name]
            if of_pass:
                found.append(_times(before + title, of_pass))
        found += _memory(before, own)
    return found


def _times(title: str, rows: Rows) -> Table:
    """A line a case; the last column is what the hybrids gain over the fastest teacher."""
    names = implementations(rows)
    own = [name for name in names if not name.startswith("teacher")]
    others = [name for name in names if name.startswith("teacher")]
    if rows[0]["pass"] == "largest":
        return _largest(title, rows, names)
    lines = []
    for case, found in _thinned(_cases(rows)):
        cells = [_time_cell(found.get(name)) for name in names]
        gains = [_gain(found, [name], others) for name in own] if others else []
        lines.append((case, *cells, *gains))
    gains_of = [f"fastest teacher : {name}" for name in own] if others else []
    note = "Milliseconds; less is better. The mean of two measurements."
    if rows[0]["pass"] == "chunk":
        note = "Milliseconds a chunk, by the tokens that were read with it."
    return Table(title, ("sequences × context", *names, *gains_of), lines, note)


def _largest(title: str, rows: Rows, names: Sequence[str]) -> Table:
    contexts = sorted({row["case"]["context"] for row in rows})
    lines = []
    for context in contexts:
        found = {row["impl"]: row for row in rows if row["case"]["context"] == context}
        lines.append((tokens(context), *(_largest_cell(found.get(name)) for name in names)))
    return Table(title, ("context", *names), lines, "Sequences, and tokens a second of all of them.")


def _memory(before: str, rows: Rows) -> Iterator[Table]:
    names = implementations(rows)
    measured = [row for row in rows if row["pass"] in ("decode", "chunk") and "error" not in row]
    lines = []
    for context in sorted({row["case"]["context"] for row in measured if row["pass"] == "decode"}):
        states = {row["impl"]: row["state_bytes"] for row in measured if row["case"]["context"] == context}
        lines.append((tokens(context), *(size(states[name]) if name in states else ABSENT for name in names)))
    if lines:
        yield Table(f"{before}State bytes of one sequence", ("context", *names), lines)
    peaks = [row for row in rows if row.get("peak_bytes") is not None and row["pass"] != "largest"]
    for name, title in (("prefill", "prefill"), ("decode", "decode"), ("chunk", "one long text")):
        of_pass = [row for row in peaks if row["pass"] == name]
        if of_pass:
            lines = [
                (case, *(size(found[impl]["peak_bytes"]) if impl in found else ABSENT for impl in names))
                for case, found in _thinned(_cases(of_pass))
            ]
            yield Table(f"{before}Peak memory of {title}", ("sequences × context", *names), lines, "Weights included.")


def _cases(rows: Rows) -> list[tuple[str, dict[str, Row]]]:
    """(case, row by implementation), by batch and context."""
    keys = sorted({(row["case"]["B"], row["case"]["context"]) for row in rows})
    return [
        (
            f"{batch} × {tokens(context)}",
            {row["impl"]: row for row in rows if (row["case"]["B"], row["case"]["context"]) == (batch, context)},
        )
        for batch, context in keys
    ]


def _thinned(cases: list[tuple[str, dict[str, Row]]]) -> list[tuple[str, dict[str, Row]]]:
    """All cases, or of the many chunks of a long text some that are evenly spread, the last among them."""
    is_long = any(row["pass"] == "chunk" for _, found in cases for row in found.values())
    if not is_long or len(cases) <= _MOST_CHUNKS:
        return cases
    return [cases[round(n * (len(cases) - 1) / (_MOST_CHUNKS - 1))] for n in range(_MOST_CHUNKS)]


def _time_cell(row: Row | None) -> str:
    if row is None:
        return ABSENT
    return str(row["error"]) if "error" in row else rounded(milliseconds(row))


def _largest_cell(row: Row | None) -> str:
    if row is None:
        return ABSENT
    return str(row["error"]) if "error" in row else f"{row['case']['B']}, {rounded(row['tokens_per_s'])} tokens/s"


def _gain(found: Mapping[str, Row], own: Sequence[str], others: Sequence[str]) -> str:
    def fastest(names: Sequence[str]) -> float | None:
        times = [milliseconds(found[name]) for name in names if name in found]
        return min((value for value in times if value is not None), default=None)

    mine, theirs = fastest(own), fastest(others)
    return f"× {theirs / mine:.2f}" if mine and theirs else ABSENT


def _about(machine: Row) -> str:
    versions = {"torch": machine.get("torch"), "triton": machine.get("triton"), **(machine.get("versions") or {})}
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    dtype = f", {machine['dtype']}" if machine.get("dtype") else ""
    return f"\nMeasured on {machine.get('device')}{dtype}; {named}."
