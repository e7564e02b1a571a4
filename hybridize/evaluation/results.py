"""results.json: written whole or not at all, read strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridize.checkpoint.resources import resource_errors, sync_file

SCHEMA = "hybridize/results/1"
"""Name and version of the form; the number grows when a reader of the old one would misread the new."""


def write_results(results: Mapping[str, Any], out: Path) -> None:
    """Writes the file beside its final name, makes it durable and renames it; never NaN, which is no JSON.

    Raises:
        ResourceError: disk, quota or permission.
    """
    text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    with resource_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            sync_file(partial)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
        sync_file(out.parent)


def failed_probes(results: Mapping[str, Any]) -> list[str]:
    """Names of the probes that could not be finished."""
    return [name for name, probe in results["probes"].items() if probe["status"] == "failed"]
