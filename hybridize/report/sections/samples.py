"""Prompts with both continuations."""

from __future__ import annotations

from hybridize.report.blocks import Paragraphs, Quotes, Section
from hybridize.report.results import Results, probe


def samples(results: Results) -> Section | None:
    """Every prompt with what teacher and student make of it."""
    found = probe(results, "samples")
    if found is None:
        return None
    parts = [
        (name.capitalize(), row["prompt"] + row[name])
        for row in found["samples"]
        for name in ("teacher", "student")
        if row[name] is not None
    ]
    return Section("Samples", [Paragraphs([("", f"Greedy, at most {found['new_tokens']} tokens.")]), Quotes(parts)])
