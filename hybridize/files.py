"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_whole(path: Path, data: bytes | str) -> Path:
    """Write `data` beside `path`, make it durable, and give it its name in one step; text becomes UTF-8.

    A process that is killed on the way leaves the old file, or none, and a hidden partial file beside it.

    Returns:
        `path`.

    Raises:
        OSError: disk, quota or permission; the old file is still there.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        sync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_file(path.parent)
    return path


def sync_file(path: Path) -> None:
    """Make a file, or a folder's list of names, durable. File systems that cannot sync folders are left alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
