"""Measurements for people to read in a terminal, and the numbers that ask for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hybridize.cli.format import table_lines
from hybridize.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

_FACTORS = {"": 1, "k": 2**10, "m": 2**20}


def counts(text: str, option: str) -> tuple[int, ...]:
    """ "1k,8k" -> (1024, 8192); each once, smallest first.

    Raises:
        UsageError: not positive whole numbers with commas between them.
    """
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,12})([km]?)", part.strip().lower())
        count = int(match[1]) * _FACTORS[match[2]] if match else 0
        if count == 0:
            raise UsageError(
                f"{part.strip()!r} is not a positive whole number.",
                where=option,
                hint="Write numbers with commas between them, such as 512,8k,1m.",
            )
        found.add(count)
    return tuple(sorted(found))


def bench_parts(found: Mapping[str, Any]) -> list[RenderableType]:
    """The tables of times and memory, and what they hold for."""
    from hybridize.report.inference import tables

    parts: list[RenderableType] = []
    for table in tables(found["rows"]):
        lines = table_lines([list(table.header), *(list(row) for row in table.rows)], left=1)
        parts += [table.title, *(f"  {line}" for line in lines), *([f"  {table.note}"] if table.note else []), ""]
    machine = found["machine"]
    return [*parts, f"{machine['device']}, {machine['dtype']}, torch {machine['torch']}"]


def notes_on_contexts(found: Mapping[str, Any]) -> Iterator[str]:
    """That a model was not trained for so long a text: what it writes there may be worth nothing, its speed is told."""
    longest = max((row["case"]["context"] for row in found["rows"]), default=0)
    if 0 < found["max_positions"] < longest:
        yield (
            f"The model was trained for {found['max_positions']:,} tokens and is timed at up to {longest:,}: "
            "speed and memory do not depend on what it was trained for; what it writes there does."
        )
