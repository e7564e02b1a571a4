"""Questions about the metadata of the installed Python packages: real documents that are on every machine.

A document is the records of a few packages, one after another, each with the beginning of its README. Then comes a
question about each of the others with its answer, and the one that is asked, all in the form of the records. Only
values that stand once in all this are asked for, so that finding one is reading it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from hybridize.evaluation.reading.passage import Passage

SOURCE = "package_metadata"
SHOWN = (
    "Name",
    "Version",
    "Summary",
    "Requires-Python",
    "License",
    "License-Expression",
    "Author",
    "Author-email",
    "Maintainer-email",
    "Home-page",
    "Project-URL",
)
NOT_ASKED = ("Name", "Version", "Requires-Python", "Project-URL")
"""The last two are much alike from package to package: a wrong answer would not be a failure to read."""
RECORDS = 4
"""In a document of any length: with it grows the way to the answer, not the number of names to be told apart."""
CHARACTERS_PER_TOKEN = 3
"""Fewer than READMEs have, so that their beginnings leave room for what stands before them."""
LONGEST_LINE = 160
SHORTEST_VALUE, LONGEST_VALUE = 4, 60
_MARKUP = re.compile(r"\s*(?:\.\.|:|#|<|\||\*\*|\[!?\[|!\[|[-=~*`^]{3})")
"""How lines of a README begin that are no prose: directives, headings, badges, tables, rules."""


@dataclass(frozen=True)
class Value:
    """What a package says of itself in one field; the text of its record holds it at `start`."""

    field: str
    text: str
    start: int


@dataclass(frozen=True)
class Record:
    """What is shown of one package, and the values that may be asked for: each one short line that it has once."""

    name: str
    text: str
    values: tuple[Value, ...]

    def asked(self, value: Value) -> str:
        """The question for a value, as the record itself has it."""
        return f"Name: {self.name}\n{value.field}:"


def package_passages(
    room: int, count: Callable[[str], int], rng: random.Random, distributions: Iterable[Any] | None = None
) -> Iterator[Passage]:
    """Every question that can be asked, in a drawn order in which the fields take turns.

    Args:
        room: tokens that document and question may have.
        count: tokens of a text as the model will see it.
        distributions: of `importlib.metadata`; None: the installed ones.
    """
    installed = metadata.distributions() if distributions is None else distributions
    found = records(installed, CHARACTERS_PER_TOKEN * room // RECORDS)
    sizes = {record.name: count(record.text) for record in found}
    turns: dict[str, list[tuple[Record, Value]]] = {}
    for record in found:
        for value in record.values:
            turns.setdefault(value.field, []).append((record, value))
    for asked in turns.values():
        rng.shuffle(asked)
    order = [(turn, field) for field, asked in turns.items() for turn in range(len(asked))]
    for turn, field in sorted(order, key=lambda place: (place[0], SHOWN.index(place[1]))):
        record, value = turns[field][turn]
        others = [other for other in found if other is not record]
        rng.shuffle(others)
        cue, chosen = _compose(record, value, others, room, count, sizes, rng)
        passage = _passage(record, value, cue, chosen)
        if passage is not None:
            yield passage


def records(distributions: Iterable[Any], readme_characters: int) -> list[Record]:
    """One record a package that has anything to ask for, sorted by name.

    Args:
        readme_characters: shown of the prose of a README.
    """
    by_name: dict[str, Record] = {}
    for distribution in distributions:
        name = distribution.metadata["Name"]
        if name and name.lower() not in by_name:
            by_name[name.lower()] = _record(name, distribution.metadata, readme_characters)
    return [record for _, record in sorted(by_name.items()) if record.values]


def _record(name: str, fields: Any, readme_characters: int) -> Record:
    text = ""
    values = []
    for field in SHOWN:
        lines = [" ".join(line.split()) for line in map(str, fields.get_all(field) or ()) if "\n" not in line.strip()]
        for line in lines:
            if not line or len(line) > LONGEST_LINE:
                continue
            if field not in NOT_ASKED and len(lines) == 1 and SHORTEST_VALUE <= len(line) <= LONGEST_VALUE:
                values.append(Value(field, line, len(text) + len(field) + 2))
            text += f"{field}: {line}\n"
    readme = str(fields.get_payload() or fields["Description"] or "")
    return Record(name, f"{text}\n{_beginning(readme, readme_characters)}".rstrip() + "\n\n", tuple(values))


def _beginning(readme: str, characters: int) -> str:
    """The first prose of a README."""
    prose = "\n".join(line.strip() for line in readme.splitlines() if line.strip() and not _MARKUP.match(line))
    return prose if len(prose) <= characters else prose[:characters].rpartition(" ")[0]


def _compose(
    record: Record,
    value: Value,
    others: list[Record],
    room: int,
    count: Callable[[str], int],
    sizes: dict[str, int],
    rng: random.Random,
) -> tuple[str, list[Record]]:
    """The question with its worked examples, and the records of the document in a drawn order."""
    question = record.asked(value)
    chosen = [record]
    worked = ""
    left = room - sizes[record.name] - count(question)
    for other in others:
        shown = rng.choice(other.values)
        line = f"{other.asked(shown)} {shown.text}\n\n"
        needed = sizes[other.name] + count(line)
        if needed <= left and len(chosen) < RECORDS:
            chosen.append(other)
            worked += line
            left -= needed
    rng.shuffle(chosen)
    return worked + question, chosen


def _passage(record: Record, value: Value, cue: str, chosen: list[Record]) -> Passage | None:
    """None where the value does not stand just once in document and question."""
    document = "".join(part.text for part in chosen)
    if f"{document}{cue}".lower().count(value.text.lower()) != 1:
        return None
    head = sum(len(part.text) for part in chosen[: chosen.index(record)])
    start = head + value.start
    end = start + len(value.text)
    question = f"{value.field} of {record.name}:"
    return Passage(SOURCE, document, cue, (value.text,), (head, end), (start, end), question)
