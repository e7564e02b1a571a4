"""Where results come from: models, texts, versions, machine and command."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint import resolve_source, sha256_file, source_fingerprint
from hybridize.evaluation.windows import document_records
from hybridize.recipe.documents import Document
from hybridize.recipe.probes import Evaluate

_PACKAGES = ("hybridize", "torch", "transformers", "triton", "tokenizers", "safetensors")


def provenance(
    *,
    settings: Evaluate,
    documents: Sequence[Document],
    device: torch.device,
    dtype: torch.dtype,
    batch_tokens: int,
    seed: int,
    recipe_sha256: str | None,
    command: str | None,
) -> dict[str, Any]:
    """Everything but the models (`model_record`)."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": None if command is None else without_home(command),
        "recipe_sha256": recipe_sha256,
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "batch_tokens": batch_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "documents": document_records(documents),
    }


def model_record(spec: str, *, offline: bool) -> dict[str, Any]:
    """What is known of a model: spec, revision, fingerprint of its files, and of its manifest if it is one of ours."""
    source = resolve_source(spec, offline=offline)
    manifest = source.path / "manifest.json"
    return {
        "spec": without_home(spec),
        "revision": source.revision,
        "fingerprint": source_fingerprint(source),
        "manifest_sha256": sha256_file(source.path, "manifest.json")[0] if manifest.is_file() else None,
        "size_bytes": source.size_bytes,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu" with the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def without_home(text: str) -> str:
    """`text` with the user's home folder as ~: results are published, user names are not."""
    home = str(Path.home())
    return text if home in ("/", "") else text.replace(home, "~")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
