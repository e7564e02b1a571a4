"""Questions with answers: reading, multiple choice, and tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridize.report.blocks import Block, Quotes, Section
from hybridize.report.numbers import ABSENT, percent, share, with_error
from hybridize.report.pairs import chance_of, kept, samples_of
from hybridize.report.results import Results, probe
from hybridize.report.tables import Table

_HEADER = ("student", "teacher", "student : teacher", "questions")


def answers(results: Results) -> Section:
    """A table for each of the probes."""
    blocks: list[Block] = []
    if reading := probe(results, "reading"):
        blocks += _reading(reading)
    if choices := probe(results, "choices"):
        blocks.append(_choices(choices))
    if harness := probe(results, "harness"):
        blocks.append(_harness(harness))
    return Section("Questions", blocks)


def _reading(reading: Mapping[str, Any]) -> Iterator[Block]:
    named = [*([("all", reading)] if len(reading["sources"]) != 1 else []), *reading["sources"].items()]
    rows = [(name, share(row["student"]), share(row["teacher"]), kept(row), samples_of(row)) for name, row in named]
    spans = "; ".join(
        f"{name} {row['prompt_tokens'][0]}-{row['prompt_tokens'][1]}" for name, row in named if "questions" in row
    )
    note = f"The answer must be in the continuation. Tokens of the prompts: {spans}."
    yield Table("Reading", ("source", *_HEADER), rows, note)
    quotes = [
        (f"{name}: {' or '.join(example['answers'])}", _example(example))
        for name, row in reading["sources"].items()
        for example in row["examples"]
    ]
    if quotes:
        yield Quotes(quotes)


def _example(example: Mapping[str, Any]) -> str:
    lines = [example["question"].strip()]
    lines += [f"  {name}: {' '.join(example[name].split())}" for name in ("teacher", "student") if example.get(name)]
    return "\n".join(lines)


def _choices(choices: Mapping[str, Any]) -> Table:
    rows = []
    if len(choices["tasks"]) != 1:
        rows.append(("all", *_choice_cells(choices, chance_of(choices))))
    rows += [(name, *_choice_cells(row, row["chance"])) for name, row in choices["tasks"].items()]
    note = "The likeliest answer by bytes (acc_bytes of lm-evaluation-harness); chance is what guessing scores."
    header = ("task", "chance", *_HEADER, "same choice")
    return Table("Multiple choice", header, rows, note)


def _choice_cells(row: Mapping[str, Any], chance: float) -> tuple[str, ...]:
    pair = (share(row["student"]), share(row["teacher"]), kept(row, chance))
    same = row.get("same")
    return (percent(chance), *pair, samples_of(row), ABSENT if same is None else percent(same["share"]))


def _harness(harness: Mapping[str, Any]) -> Table:
    rows = [
        (f"{task}, {metric}", with_error(row, "student", 4), with_error(row, "teacher", 4), _over(row))
        for task, metrics in harness["tasks"].items()
        for metric, row in metrics.items()
    ]
    limit = f", the first {harness['limit']} questions" if harness.get("limit") else ""
    note = f"lm-evaluation-harness {harness['version']}{limit}."
    return Table("lm-evaluation-harness", ("task, metric", "student", "teacher", "student : teacher"), rows, note)


def _over(row: Mapping[str, Any]) -> str:
    student, teacher = row["student"], row.get("teacher")
    return f"× {student / teacher:.3f}" if student is not None and teacher else ABSENT
