"""Opening files that strangers wrote: contained names, regular files only, bounded and strict JSON."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from hybridize.errors import CheckpointError, ResourceError

MAX_JSON_BYTES = 8 * 2**20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FOREIGN_NAME_HINT = "Download the checkpoint again from a source you trust, or correct the name."


def check_relative_name(name: object, *, where: str) -> str:
    """Return `name` if it names a file inside its folder on every system; sub-folders are allowed.

    Raises:
        CheckpointError: for anything absolute, climbing out, or that some system reads as another path.
    """
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"The file name {name!r} is not a text.", where=where, hint=FOREIGN_NAME_HINT)
    hostile = (
        any(ord(character) < 32 or ord(character) == 127 for character in name)
        or "\\" in name
        or ":" in name
        or any(part in ("", ".", "..") for part in name.split("/"))
        or PurePosixPath(name).is_absolute()
    )
    if hostile or len(name) > 1024:
        raise CheckpointError(
            f"The file name {name[:120]!r} does not stay inside the folder.", where=where, hint=FOREIGN_NAME_HINT
        )
    return name


def check_shard_name(name: object, *, where: str) -> str:
    """Return `name` if it is a bare ``*.safetensors`` file name, as every entry of an index must be."""
    checked = check_relative_name(name, where=where)
    if "/" in checked:
        raise CheckpointError(
            f"The shard name {checked[:120]!r} holds a folder; an index may only name files beside it.",
            where=where,
            hint=FOREIGN_NAME_HINT,
        )
    if not checked.endswith(".safetensors"):
        raise CheckpointError(
            f"The index names {checked[:120]!r}, which is not a .safetensors file.",
            where=where,
            hint="Only safetensors are read, because pickle files can run code. Save the model as safetensors.",
        )
    return checked


def contained_path(folder: Path, name: str) -> Path:
    """Resolve `name` in `folder` to a real path, refusing links that leave the folder.

    The Hub cache stores files once and links to them; links into its own blob stores are followed.

    Raises:
        CheckpointError: missing file, symlink loop, or a link that leaves the folder.
    """
    path = folder / name
    try:
        root = Path(os.path.realpath(folder, strict=True))
        real = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        raise CheckpointError(
            "The file is missing.", where=str(path), hint="Copy or download the checkpoint again; it is incomplete."
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"The path cannot be followed ({error}).", where=str(path), hint="Replace the link by the file itself."
        ) from None
    if real.is_relative_to(root) or _is_hub_blob(root, real):
        return real
    raise CheckpointError(
        "The file is a link that leaves the checkpoint's folder.",
        where=str(path),
        hint="Copy the file itself into the folder if you trust it.",
    )


def _is_hub_blob(root: Path, real: Path) -> bool:
    """Whether `real` is a blob of the Hub cache that `root` (``models--x/snapshots/rev``) is a snapshot of."""
    if root.parent.name != "snapshots" or not root.parent.parent.name.startswith("models--"):
        return False
    repository = root.parent.parent
    shared_store = repository.parent / "blobs"  # huggingface_hub 2 keeps large blobs once a cache: blobs/<2 hex>/<hash>
    return real.parent == repository / "blobs" or real.parent.parent == shared_store


def open_regular(folder: Path, name: str) -> tuple[BinaryIO, int]:
    """Open ``folder/name`` for reading; return the file and its size in bytes.

    A FIFO or device is refused without waiting for it.

    Raises:
        CheckpointError: missing, not contained, not a regular file, or unreadable.
    """
    path = contained_path(folder, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            hint = "Raise the limit: ulimit -n 4096."
            raise ResourceError("Too many files are open.", where=str(folder / name), hint=hint) from error
        raise CheckpointError(
            f"The file cannot be opened ({error.strerror}).", where=str(folder / name), hint="Check its permissions."
        ) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(
            "This is not a regular file (a folder, pipe or device).",
            where=str(folder / name),
            hint="A checkpoint holds plain files only; remove it or download the checkpoint again.",
        )
    return os.fdopen(descriptor, "rb"), status.st_size


def list_names(folder: Path) -> list[str]:
    """Names in a folder, sorted. Raises CheckpointError if it cannot be listed."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        what = f"The folder cannot be read ({error.strerror})."
        raise CheckpointError(what, where=str(folder), hint="Check the path and its permissions.") from None


def read_json_object(folder: Path, name: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse ``folder/name`` as one JSON object: size-capped, UTF-8, no duplicate keys."""
    where = str(folder / name)
    file, size = open_regular(folder, name)
    with file:
        if size > max_bytes:
            raise CheckpointError(
                f"The file has {size:,} bytes; at most {max_bytes:,} are read.",
                where=where,
                hint="A file this large is damaged or not what its name says; download it again.",
            )
        text = file.read(max_bytes + 1)
    return parse_json_object(text, where=where)


def parse_json_object(text: bytes, *, where: str) -> dict[str, Any]:
    """Parse bytes as one JSON object without duplicate keys; every fault is a CheckpointError at `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {repeated[:80]!r} is there twice")
        return found

    hint = "The file is damaged; download or save it again."
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"The JSON is not UTF-8 (byte {error.start}).", where=where, hint=hint) from None
    except RecursionError:
        raise CheckpointError("The JSON is nested too deeply.", where=where, hint=hint) from None
    except ValueError as error:
        raise CheckpointError(f"The JSON cannot be parsed: {error}.", where=where, hint=hint) from None
    if not isinstance(value, dict):
        raise CheckpointError("The JSON is not an object.", where=where, hint=hint)
    return value
