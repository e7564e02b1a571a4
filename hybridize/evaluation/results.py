"""results.json: written whole or not at all, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridize.checkpoint import has_our_manifest, read_manifest, sha256_bytes
from hybridize.checkpoint.resources import resource_errors
from hybridize.files import write_whole

SCHEMA = "hybridize/results/2"
"""Name and version of the form; the number grows when a reader of the old one would misread the new."""

_CONTENTS = (".safetensors", ".json", ".model")


def write_results(results: Mapping[str, Any], out: Path) -> None:
    """Writes the file beside its final name, makes it durable and renames it; never NaN, which is no JSON.

    Raises:
        ResourceError: disk, quota or permission.
    """
    text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with resource_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)


def contents_sha256(folder: Path) -> str | None:
    """What was measured, as one SHA-256 of the manifest's records of weights, settings and tokenizer; None for a folder
    that has no manifest of ours. The card, which is written anew with the results in it, is left out."""
    if not has_our_manifest(folder):
        return None
    files = read_manifest(folder).files.items()
    lines = [f"{name}\0{file.sha256}\n" for name, file in sorted(files) if name.endswith(_CONTENTS)]
    return sha256_bytes("".join(lines).encode())


def failed_probes(results: Mapping[str, Any]) -> list[str]:
    """Names of the probes that could not be finished."""
    return [name for name, probe in results["probes"].items() if probe["status"] == "failed"]
