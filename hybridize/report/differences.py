"""Where evaluations were made in different ways, so that their numbers must not be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridize.report.blocks import Block, Paragraphs
from hybridize.report.names import model_name
from hybridize.report.results import Results
from hybridize.report.tables import Table

_NO_MATTER = {"batch_tokens"}
"""Settings that change how fast a number is found, not the number."""


def differences(names: Sequence[str], results: Sequence[Results]) -> Iterator[Block]:
    """Sentences that say what differs, and a table of the values; one sentence where nothing does."""
    rows = [(what, values) for what, values in _compared(results) if len(set(values)) > 1]
    missing = [*_missing(names, results)]
    if rows:
        listed = ", ".join(what for what, _ in rows)
        words = f"These were not measured in the same way: {listed}. Compare only numbers that this does not touch."
        yield Paragraphs([("Not alike", words), *missing])
        table_rows = [(what, *map(_short, values)) for what, values in rows]
        yield Table("What differs", ("", *names), table_rows)
    else:
        words = "The same teacher, texts, seed, precision and settings of the probes: the numbers can be compared."
        yield Paragraphs([("Alike", words), *missing])


def _compared(results: Sequence[Results]) -> Iterator[tuple[str, list[str]]]:
    yield "teacher", _teachers(results)
    made = [one["provenance"] for one in results]
    yield "held-out texts", [_texts(one) for one in made]
    for what in ("seed", "dtype", "device"):
        yield what, [str(one[what]) for one in made]
    settings = [dict(_flat(one["settings"])) for one in made]
    # Probes that one evaluation has and another has not are told apart: their settings are no difference.
    for key in dict.fromkeys(key for flat in settings for key in flat):
        if key not in _NO_MATTER and all(key in flat for flat in settings):
            yield key, [flat[key] for flat in settings]


def _teachers(results: Sequence[Results]) -> list[str]:
    """Name and fingerprint of each; the same files are one teacher, whatever they were called."""
    names: dict[str, str] = {}
    found = []
    for one in results:
        teacher = one["teacher"]
        if teacher is None:
            found.append("none")
        else:
            mark = teacher["fingerprint"][:8]
            found.append(f"{names.setdefault(mark, model_name(teacher))} {mark}")
    return found


def _texts(made: Mapping[str, Any]) -> str:
    """How many, and one name for exactly these."""
    hashes = sorted(document["sha256"] for document in made["documents"])
    name = hashlib.sha256("".join(hashes).encode()).hexdigest()[:8]
    return f"{len(hashes)} ({name})" if hashes else "none"


def _flat(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif settings is not None or "." in path:
        yield path, _written(settings)


def _written(setting: Any) -> str:
    if isinstance(setting, list | tuple):
        return ", ".join(map(_written, setting)) or "none"
    return setting if isinstance(setting, str) else json.dumps(setting)


def _missing(names: Sequence[str], results: Sequence[Results]) -> Iterator[tuple[str, str]]:
    for what in dict.fromkeys(name for one in results for name in one["probes"]):
        without = [
            name
            for name, one in zip(names, results, strict=True)
            if one["probes"].get(what, {"status": "missing"})["status"] != "ok"
        ]
        if 0 < len(without) < len(names):
            yield f"No {what.replace('_', ' ')}", f"Not measured in {', '.join(without)}."


def _short(value: str, most: int = 60) -> str:
    return value if len(value) <= most else value[: most - 1] + "…"
