"""A table, how it is written in Markdown, and the table that comes first: the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.report.numbers import ABSENT, rounded, share, size, tokens, with_error
from hybridize.report.pairs import by_length, chance_of, kept
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


def markdown(table: Table, level: int = 2) -> str:
    """The table as Markdown, under a heading of that level."""
    lines = [f"{'#' * level} {plain(table.title)}", ""]
    lines += [_markdown_row(table.header), _markdown_row(("---", *("---:" for _ in table.header[1:])))]
    lines += [_markdown_row(row) for row in table.rows]
    if table.note:
        lines += ["", plain(table.note)]
    return "\n".join(lines) + "\n"


_SPECIAL = str.maketrans({"<": "&lt;", "&": "&amp;", "[": "\\[", "`": "\\`", "*": "\\*", "\n": " "})


def plain(words: str) -> str:
    """Words that stay words in Markdown: names of models and texts may hold anything."""
    return words.translate(_SPECIAL)


def _markdown_row(cells: Row) -> str:
    return "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |"


def summary(results: Results) -> Table:
    """A line for each probe: what the student has, what the teacher has, what was lost or saved, with intervals."""
    rows = [*_text_rows(results), *_answer_rows(results), *_cost_rows(results)]
    return Table("Student and teacher", SUMMARY_HEADER, rows, _summary_note(results))


def _text_rows(results: Results) -> list[Row]:
    rows: list[Row] = []
    if ppl := probe(results, "perplexity"):
        over = ABSENT if ppl["ratio"] is None else f"× {with_error(ppl, 'ratio', 3)}"
        rows.append(("perplexity on held-out text", with_error(ppl, "student"), with_error(ppl, "teacher"), over))
    if close := probe(results, "agreement"):
        rows.append(("same next token as the teacher", with_error(close, "top1", 1, 100.0) + " %", ABSENT, ABSENT))
        rows.append(("KL from the teacher (nats a token)", with_error(close, "kl", 3), ABSENT, ABSENT))
    if same := probe(results, "continuation"):
        label = f"greedy tokens in common, of {same['new_tokens']}"
        rows.append((label, with_error(same, "same_tokens", 1), ABSENT, ABSENT))
    return rows


def _answer_rows(results: Results) -> list[Row]:
    rows: list[Row] = []

    def add(label: str, pair: Mapping[str, Any], chance: float = 0.0) -> None:
        rows.append((label, share(pair["student"]), share(pair["teacher"]), kept(pair, chance)))

    if recall := probe(results, "recall"):
        for length, pair in by_length(recall["by_length"]):
            add(f"recall in {tokens(length)} tokens", pair)
    if reading := probe(results, "reading"):
        add("reading: answers found in documents", reading)
    if choices := probe(results, "choices"):
        chance = chance_of(choices)
        add(f"multiple choice (chance {chance * 100:.0f} %)", choices, chance)
    return rows


def _cost_rows(results: Results) -> list[Row]:
    rows: list[Row] = []
    if state := probe(results, "state_bytes"):
        label = f"state bytes at {tokens(state['tokens'])} tokens"
        rows.append((label, size(state["student"]), size(state["teacher"]), f"× {state['ratio']:.3f}"))
    speed = probe(results, "speed")
    for kind, label in (("prefill", "prefill of {} (tokens/s)"), ("decode", "decode after {} (ms a step)")):
        if speed and speed[kind]:
            row = max(speed[kind], key=lambda row: (row["tokens"], -row["sequences"]))
            text = label.format(f"{row['sequences']} × {tokens(row['tokens'])} tokens")
            rows.append((text, rounded(row["student"]), rounded(row["teacher"]), over_teacher(row)))
    return rows


DECODE_HEADER: Row = ("one step at", "student", "teacher", "student : teacher", "its state", "teacher's state")


def decode_rows(results: Results) -> list[Row]:
    """A row for each measured length: milliseconds a step of all sequences, and the state of one."""
    return [
        (
            f"{row['sequences']} × {tokens(row['tokens'])} tokens",
            f"{rounded(row['student'])} ms",
            ABSENT if row["teacher"] is None else f"{rounded(row['teacher'])} ms",
            over_teacher(row),
            *(_state_cell(row.get(f"{name}_state_bytes")) for name in ("student", "teacher")),
        )
        for row in (probe(results, "speed") or {"decode": []})["decode"]
    ]


def _state_cell(num_bytes: int | None) -> str:
    return ABSENT if num_bytes is None else size(num_bytes)


def over_teacher(row: Mapping[str, Any]) -> str:
    """Student over teacher of two plain numbers."""
    return f"× {row['student'] / row['teacher']:.2f}" if row["student"] and row["teacher"] else ABSENT


def _summary_note(results: Results) -> str:
    notes = ["± is one standard error; brackets are 95 % intervals."]
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
