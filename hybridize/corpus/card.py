"""README.md of a corpus: what is in it, and the lines of a recipe that train on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridize.corpus.ingredients import FACTS

_LICENCE = """\
## Licence

The licence of a text is its source's own; hybridize adds none. Look it up before passing this folder on.
"""


def card(summary: Mapping[str, Any]) -> str:
    """Renders the card from what corpus.json says."""
    unit = summary["unit"]
    rows = [
        f"| `{path}` | {file['documents']:,} | {file[unit]:,} | {file['size_bytes'] / 1e6:,.1f} |"
        for path, file in summary["files"].items()
    ]
    notes = [f"- {note}" for note in summary.get("notes", ())]
    lines = [
        "# Training and held-out text",
        "",
        f"Made with `hybridize corpus` (seed {summary['seed']}). {summary['made_of']}",
        "",
        f"| file | documents | {unit} | MB |",
        "|---|--:|--:|--:|",
        *rows,
        "",
        *notes,
        *([""] if notes else []),
        "Every line is a JSON object: `text`, `id` (where it came from) and `source`. `corpus.json` says what was left",
        "out and why.",
        "",
        "## Use",
        "",
        "In a recipe beside this folder (here `corpus`); training files hold all sources, shuffled:",
        "",
        "```yaml",
        *recipe_lines(summary),
        "```",
        "",
        *(_choose(facts) if (facts := _facts_of(summary)) else []),
        _LICENCE,
    ]
    return "\n".join(lines)


def _choose(path: str) -> list[str]:
    return [
        f"`{path}` has documents with facts that are not trained on, to choose layers by:",
        f"`hybridize choose RECIPE --text corpus/{path}`.",
        "",
    ]


def recipe_lines(summary: Mapping[str, Any], folder: str = "corpus") -> list[str]:
    """The `data` block of a recipe that trains on the corpus.

    Every held-out file is a source of its own, which a report names; documents with facts are not among them, since
    `hybridize choose` passes over what a recipe holds out.
    """
    lines = ["data:", f"  train: [{folder}/train/*.jsonl]"]
    held_out = [path for path in summary["files"] if path.startswith("held-out/") and path != _facts_of(summary)]
    return lines + (["  held_out:"] if held_out else []) + [f"    - {folder}/{path}" for path in held_out]


def _facts_of(summary: Mapping[str, Any]) -> str | None:
    """The file of held-out documents with facts, where there is one."""
    path = f"held-out/{FACTS}.jsonl"
    return path if summary["options"].get("facts") and path in summary["files"] else None
