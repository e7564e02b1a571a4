"""Disk, permissions and file handles: checked before work where that is possible, explained where it is not."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridize.errors import ResourceError

DISK_MARGIN = 1.1

_ADVICE = {
    errno.ENOSPC: ("The disk is full.", "Free some space, or write to another disk with --out."),
    errno.EDQUOT: ("Your disk quota is used up.", "Free some space, or write to another disk with --out."),
    errno.EMFILE: ("Too many files are open.", "Raise the limit: ulimit -n 4096."),
    errno.ENFILE: ("Too many files are open on this machine.", "Close other programs, or raise fs.file-max."),
    errno.EROFS: ("The file system is read-only.", "Write somewhere else with --out."),
    errno.EACCES: ("You may not write here.", "Change the folder's permissions, or write somewhere else with --out."),
    errno.EPERM: ("You may not write here.", "Change the folder's permissions, or write somewhere else with --out."),
}


@contextmanager
def resource_errors(where: str | Path) -> Iterator[None]:
    """Turn an exhausted disk, quota, file-handle limit or missing permission into ResourceError at `where`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        what, hint = _ADVICE[error.errno]
        raise ResourceError(what, where=str(error.filename or where), hint=hint) from error


def existing_parent(path: Path) -> Path:
    """`path`, or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def require_free_disk(path: str | Path, need_bytes: int) -> None:
    """Refuse to begin a write for which 1.1 times `need_bytes` are not free where `path` will be.

    Raises:
        ResourceError: says what is needed and what is free.
    """
    folder = existing_parent(Path(path))
    with resource_errors(folder):
        free = shutil.disk_usage(folder).free
    needed = int(need_bytes * DISK_MARGIN)
    if free < needed:
        what = f"Writing needs {needed / 2**30:,.2f} GiB of free disk and {free / 2**30:,.2f} GiB are free."
        raise ResourceError(what, where=str(folder), hint="Free some space, or write to another disk with --out.")


def require_memory(need_bytes: int) -> None:
    """Refuse to begin what takes more memory than there is; other programs' share is not guessed at.

    Raises:
        ResourceError: says what is needed and what there is.
    """
    limit = memory_limit_bytes()
    if limit is not None and need_bytes > limit:
        what = f"This needs {need_bytes / 2**30:,.2f} GiB of memory and there are {limit / 2**30:,.2f} GiB with swap."
        hint = "Use a machine with more memory, add swap, or store the result in a smaller type (dtype: bfloat16)."
        raise ResourceError(what, where="memory", hint=hint)


def memory_limit_bytes() -> int | None:
    """Memory and swap of this machine, or of the container if that is less; None where nobody says (not Linux)."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        limits.append(sizes["MemTotal"] + sizes.get("SwapTotal", 0))
    except (OSError, ValueError, LookupError):
        pass
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return min(limits, default=None)
