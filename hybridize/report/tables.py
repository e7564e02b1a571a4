"""Results as tables: rows of text, and two ways to write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.report.numbers import ABSENT, found, percent, size, tokens, with_error
from hybridize.report.results import Results, probe

Row = tuple[str, ...]
SUMMARY_HEADER: Row = ("", "student", "teacher", "student : teacher")


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column is a label, the others hold numbers."""

    title: str
    header: Row
    rows: Sequence[Row]
    note: str = ""


def markdown(table: Table) -> str:
    """The table as Markdown, under a heading."""
    lines = [f"## {table.title}", ""]
    lines += [_markdown_row(table.header), _markdown_row(("---", *("---:" for _ in table.header[1:])))]
    lines += [_markdown_row(row) for row in table.rows]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Row) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plain(table: Table) -> str:
    """The table for a terminal: columns padded with blanks, numbers to the right."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    lines = [table.title]
    for row in rows:
        label, *values = (cell for cell in row)
        padded = [label.ljust(widths[0]), *(v.rjust(w) for v, w in zip(values, widths[1:], strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, table.note] if table.note else lines) + "\n"


def all_tables(results: Results) -> list[Table]:
    """Every table that the results have numbers for, the summary first."""
    makers = (perplexity_by_position, perplexity_by_source, recall_table, agreement_table, state_table)
    tables = [summary(results), *(maker(results) for maker in makers)]
    return [table for table in tables if table is not None]


def summary(results: Results) -> Table:
    """One line a measure: what the student has, what the teacher has, what was lost or saved."""
    rows: list[Row] = []
    if ppl := probe(results, "perplexity"):
        ratio = ABSENT if ppl["ratio"] is None else f"× {with_error(ppl, 'ratio', 3)}"
        rows.append(("perplexity on held-out text", with_error(ppl, "student"), with_error(ppl, "teacher"), ratio))
    if close := probe(results, "agreement"):
        rows.append(("same next token as the teacher", with_error(close, "top1", 1, 100.0) + " %", ABSENT, ABSENT))
        rows.append(("KL from the teacher (nats a token)", with_error(close, "kl", 3), ABSENT, ABSENT))
    if recall := probe(results, "recall"):
        for length, cells in recall_by_length(recall).items():
            row = (found(cells["student"]), found(cells["teacher"]), _kept(cells["student"], cells["teacher"]))
            rows.append((f"needles found in {tokens(length)} tokens", *row))
    if state := probe(results, "state_bytes"):
        label = f"state bytes at {tokens(state['tokens'])} tokens"
        rows.append((label, size(state["student"]), size(state["teacher"]), f"× {state['ratio']:.3f}"))
    return Table("Student and teacher", SUMMARY_HEADER, rows, _summary_note(results))


def recall_by_length(recall: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Hits by length over all kinds, as cells {"hits", "samples", "share", "low", "high"} for student and teacher."""
    cells: dict[int, dict[str, Any]] = {}
    for length, parts in sorted(recall["by_length"].items(), key=lambda item: int(item[0])):
        cells[int(length)] = parts
    return cells


def _kept(student: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> str:
    return ABSENT if not teacher or not teacher["hits"] else f"× {student['share'] / teacher['share']:.2f}"


def _summary_note(results: Results) -> str:
    notes = ["± is one standard error; brackets are 95 % intervals (Wilson)."]
    if results.get("teacher") is None:
        notes.append("No teacher was given, so nothing is compared.")
    missing = [
        f"{name.replace('_', ' ')} ({other['status']}: {other['error']})"
        for name, other in results["probes"].items()
        if other["status"] != "ok"
    ]
    if missing:
        notes.append(f"Not measured: {', '.join(missing)}.")
    state = probe(results, "state_bytes")
    broken = [name for name, row in (state or {}).get("measured", {}).items() if not row["as_promised"]]
    if broken:
        notes.append(f"The measured state of {' and '.join(broken)} is not what the configuration promises.")
    return " ".join(notes)


def perplexity_by_position(results: Results) -> Table | None:
    """Perplexity in ranges of token positions."""
    ppl = probe(results, "perplexity")
    if ppl is None:
        return None
    rows = [(f"{row['from']}-{row['to']}", *_perplexity_cells(row)) for row in ppl["by_position"]]
    return Table("Perplexity by position", ("tokens before", "student", "teacher", "ratio", "tokens"), rows)


def perplexity_by_source(results: Results) -> Table | None:
    """Perplexity on each source of held-out text."""
    ppl = probe(results, "perplexity")
    if ppl is None:
        return None
    rows = [(name, *_perplexity_cells(row)) for name, row in ppl["by_source"].items()]
    return Table("Perplexity by source", ("source", "student", "teacher", "ratio", "tokens"), rows)


def _perplexity_cells(row: Mapping[str, Any]) -> Row:
    return (with_error(row, "student"), with_error(row, "teacher"), with_error(row, "ratio", 3), f"{row['tokens']:,}")


def recall_table(results: Results) -> Table | None:
    """Needles found by kind and length."""
    recall = probe(results, "recall")
    if recall is None:
        return None
    rows = [
        (f"{kind}, {tokens(int(length))}", found(cell["student"]), found(cell["teacher"]))
        for kind, lengths in recall["kinds"].items()
        for length, cell in lengths.items()
    ]
    note = "A number in repeated noise (1), a number in prose (2), a UUID in prose (3); after RULER, arXiv 2404.06654."
    return Table("Recall of one needle", ("kind, tokens", "student", "teacher"), rows, note)


def agreement_table(results: Results) -> Table | None:
    """Agreement with the teacher by source and position."""
    close = probe(results, "agreement")
    if close is None:
        return None
    named = [("all", close), *close["by_source"].items()]
    named += [(f"tokens {row['from']}-{row['to']}", row) for row in close["by_position"]]
    rows = [(name, with_error(row, "kl", 3), percent(row["top1"]), f"{row['tokens']:,}") for name, row in named]
    return Table("Agreement with the teacher", ("text", "KL (nats a token)", "same first token", "tokens"), rows)


def state_table(results: Results) -> Table | None:
    """State bytes of one sequence over context lengths."""
    state = probe(results, "state_bytes")
    if state is None:
        return None
    rows = [
        (tokens(row["tokens"]), size(row["student"]), size(row["teacher"]), f"× {row['student'] / row['teacher']:.3f}")
        for row in state["by_context"]
    ]
    layers = Counter(layer["mixer"] for layer in state["layers"])
    plan = ", ".join(f"{count} × {name}" for name, count in layers.items())
    note = f"One sequence, keys and values in {state['element_bytes']} bytes. Layers: {plan}."
    return Table("State bytes", ("context", "student", "teacher", "student : teacher"), rows, note)
