"""The manifest: what a folder of ours holds, by name, size and SHA-256.

It is written last; a folder without it is incomplete.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridize.checkpoint.files import check_relative_name, read_json_object
from hybridize.checkpoint.folder import MANIFEST_FILE, name_some
from hybridize.checkpoint.hashing import sha256_file
from hybridize.checkpoint.resources import resource_errors
from hybridize.errors import CheckpointError
from hybridize.files import write_whole

FORMAT = "hybridize-manifest"
VERSION = 1
MAX_MANIFEST_BYTES = 64 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGAIN = "Copy or download the folder again, or repeat the command that wrote it."


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    Attributes:
        kind: "converted", "run-checkpoint", "export", ...
        files: records by relative name with forward slashes.
        created_by: name and version of the writer.
        provenance: whatever the writer wants to be known: recipe, source, fingerprint, plan.
    """

    kind: str
    files: Mapping[str, FileRecord]
    created_by: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


def folder_files(folder: Path) -> list[str]:
    """Relative names of a folder's files in order, without the manifest and without hidden files and folders."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(root).relative_to(folder)
        names += [(base / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(name for name in names if name != MANIFEST_FILE)


def write_manifest(folder: Path, kind: str, provenance: Mapping[str, Any] | None = None) -> Manifest:
    """Hash every file in `folder` and write manifest.json, durably. The same files give the same bytes."""
    files = {}
    for name in folder_files(folder):
        sha256, size = sha256_file(folder, name)
        files[name] = FileRecord(sha256, size)
    manifest = Manifest(kind, files, f"hybridize {_version()}", dict(provenance or {}))
    _write(folder, manifest)
    return manifest


def replace_in_manifest(folder: Path, names: Collection[str]) -> Manifest:
    """Hash the named files anew and write manifest.json with their records; all other records stay as they are.

    So a file that was damaged since the folder was written is still found.

    Raises:
        CheckpointError: there is no manifest of ours, or no file of such a name.
        ResourceError: disk, quota or permission; the old manifest is still there.
    """
    manifest = read_manifest(folder)
    where = str(folder / MANIFEST_FILE)
    hashed = {name: FileRecord(*sha256_file(folder, check_relative_name(name, where=where))) for name in sorted(names)}
    manifest = replace(manifest, files={**manifest.files, **hashed})
    _write(folder, manifest)
    return manifest


def _write(folder: Path, manifest: Manifest) -> None:
    files = manifest.files.items()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "kind": manifest.kind,
        "created_by": manifest.created_by,
        "files": {name: {"sha256": file.sha256, "size_bytes": file.size_bytes} for name, file in files},
        "provenance": manifest.provenance,
    }
    path = folder / MANIFEST_FILE
    with resource_errors(path):
        write_whole(path, json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _version() -> str:
    try:
        return importlib.metadata.version("hybridize")
    except importlib.metadata.PackageNotFoundError:
        return "0 (not installed)"


def read_manifest(folder: Path) -> Manifest:
    """Parse manifest.json strictly.

    Raises:
        CheckpointError: there is none (the folder is incomplete), or it is not one of ours.
    """
    where = str(folder / MANIFEST_FILE)
    if not (folder / MANIFEST_FILE).exists():
        what = f"There is no {MANIFEST_FILE}: the folder was not written by hybridize, or not to its end."
        raise CheckpointError(what, where=str(folder), hint="Run the command that wrote it again.")
    document = read_json_object(folder, MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)
    if document.get("format") != FORMAT:
        raise CheckpointError("This is not a manifest of hybridize.", where=where, hint=_AGAIN)
    if document.get("version") != VERSION:
        what = f"The manifest has version {document.get('version')!r:.20}; this program reads version {VERSION}."
        raise CheckpointError(what, where=where, hint="Upgrade hybridize.")
    files, provenance = document.get("files"), document.get("provenance", {})
    kind, created_by = document.get("kind"), document.get("created_by", "")
    well_formed = isinstance(kind, str) and isinstance(created_by, str) and isinstance(provenance, dict)
    if not well_formed or not isinstance(files, dict):
        raise CheckpointError("The manifest lacks kind or files.", where=where, hint=_AGAIN)
    records = {check_relative_name(name, where=where): _record(name, entry, where) for name, entry in files.items()}
    return Manifest(str(kind), records, str(created_by), provenance)


def _record(name: str, entry: Any, where: str) -> FileRecord:
    if isinstance(entry, dict):
        sha256, size = entry.get("sha256"), entry.get("size_bytes")
        if isinstance(sha256, str) and _SHA256.fullmatch(sha256) and type(size) is int and size >= 0:
            return FileRecord(sha256, size)
    raise CheckpointError(f"The manifest's entry of {name!r:.200} is malformed.", where=where, hint=_AGAIN)


def compare_with_manifest(folder: Path, manifest: Manifest, *, allow_extra: Collection[str] = ()) -> str:
    """Hash the folder's files; return what is missing, changed or extra, by name, or "" when all is as written."""
    present = set(folder_files(folder))
    missing = sorted(name for name in manifest.files if name not in present)
    extra = sorted(present - set(manifest.files) - set(allow_extra))
    changed = [name for name in sorted(manifest.files) if name in present and _differs(folder, name, manifest)]
    found = (("missing", missing), ("changed", changed), ("not in the manifest", extra))
    return "; ".join(f"{word}: {name_some(names)}" for word, names in found if names)


def _differs(folder: Path, name: str, manifest: Manifest) -> bool:
    sha256, size = sha256_file(folder, name)
    return FileRecord(sha256, size) != manifest.files[name]
