"""Reads what is reported: results.json and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridize.errors import UsageError

SCHEMA = "hybridize/results/2"
"""The form that this code reads (evaluation writes it)."""

Results = Mapping[str, Any]


def read_results(path: Path) -> Results:
    """The content of a results.json.

    Raises:
        UsageError: there is none, it is not one of ours, or it has another version.
    """
    hint = "`hybridize eval` and `hybridize run` make one."
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the file cannot be read ({error.strerror}).", where=str(path), hint=hint) from None
    except ValueError as error:
        raise UsageError(f"the file is not JSON ({error}).", where=str(path), hint=hint) from None
    return check_results(results, where=str(path))


def check_results(results: Any, *, where: str = "results") -> Results:
    """The results, if they have the form that this code reads.

    Raises:
        UsageError: they have not.
    """
    schema = results.get("schema") if isinstance(results, Mapping) else None
    if schema == SCHEMA and isinstance(results["probes"], Mapping):
        return dict(results)
    if isinstance(schema, str) and schema.startswith(SCHEMA.rsplit("/", 1)[0]):
        what, hint = f"the results have the form {schema}; this release reads {SCHEMA}.", "Evaluate again."
    else:
        what, hint = (
            "these are not results of an evaluation.",
            "`hybridize eval` and `hybridize run` make results.json.",
        )
    raise UsageError(what, where=where, hint=hint)


def probe(results: Results, name: str) -> Mapping[str, Any] | None:
    """The probe of that name if it was finished."""
    found = results["probes"].get(name)
    return found if found is not None and found["status"] == "ok" else None


def read_metrics(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Logged steps by stage, in order. A last line that was cut off by a crash is left out.

    Raises:
        UsageError: the file cannot be read.
    """
    stages: dict[str, list[Mapping[str, Any]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"the file cannot be read ({error.strerror}).", where=str(path)) from None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"stage", "step", "loss"} <= row.keys():
            stages.setdefault(str(row["stage"]), []).append(row)
    return stages
