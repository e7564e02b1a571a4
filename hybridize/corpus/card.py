"""README.md of a corpus: what is in it, and the lines of a recipe that train on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        "In a recipe beside this folder (here `corpus`); the weights make all files last equally long:",
        "",
        "```yaml",
        *recipe_lines(summary),
        "```",
        "",
        _LICENCE,
    ]
    return "\n".join(lines)


def recipe_lines(summary: Mapping[str, Any], folder: str = "corpus") -> list[str]:
    """The `data` block of a recipe that trains on the corpus.

    Each file is a source of its own: the files of one source would be read one after the other.
    """
    unit = summary["unit"]
    files = summary["files"]
    most = max((file[unit] for file in files.values()), default=1)
    lines = ["data:"]
    for key, part in (("train", "train/"), ("held_out", "held-out/")):
        chosen = {path: file for path, file in files.items() if path.startswith(part)}
        if chosen:
            lines.append(f"  {key}:")
        for path, file in chosen.items():
            weight = f", weight: {max(file[unit] / most, 1e-4):.4f}" if key == "train" else ""
            lines.append(f"    - {{path: {folder}/{path}{weight}}}")
    return lines
