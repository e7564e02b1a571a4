"""results.json: written whole or not at all, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridize.checkpoint.resources import resource_errors
from hybridize.files import write_whole

SCHEMA = "hybridize/results/1"
"""Name and version of the form; the number grows when a reader of the old one would misread the new."""


def write_results(results: Mapping[str, Any], out: Path) -> None:
    """Writes the file beside its final name, makes it durable and renames it; never NaN, which is no JSON.

    Raises:
        ResourceError: disk, quota or permission.
    """
    text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with resource_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)


def failed_probes(results: Mapping[str, Any]) -> list[str]:
    """Names of the probes that could not be finished."""
    return [name for name, probe in results["probes"].items() if probe["status"] == "failed"]
