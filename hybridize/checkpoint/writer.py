"""Output folders that appear whole or not at all.

Files go to ``OUT.partial-<pid>/``, are made durable, the manifest is written last, and the folder is renamed onto OUT.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hybridize.checkpoint.faults import fault_point as _fault_point
from hybridize.checkpoint.folder import MANIFEST_FILE
from hybridize.checkpoint.lock import FolderLock, process_is_alive
from hybridize.checkpoint.manifest import write_manifest
from hybridize.checkpoint.resources import resource_errors
from hybridize.errors import UsageError
from hybridize.files import sync_file

_CANNOT_RENAME = {errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EPERM, errno.EIO}


class AtomicFolder:
    """A folder that gets its name when it is complete::

        with AtomicFolder("out", kind="converted", provenance={...}) as folder:
            save_tensors(folder, tensors)

    Args:
        out: the final folder. Its parents are made.
        overwrite: replace a folder that is not empty; the old one is kept until the new one is whole.
        kind: the manifest's kind.
        provenance: the manifest's provenance. The attribute may be filled until the block ends.

    Attributes:
        notes: sentences for the user, filled when the block ends (a file system without rename).

    Raises:
        UsageError: OUT is not empty, is a file, or is being written by a living process.
        ResourceError: disk, quota, permission or file handles.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        kind: str = "checkpoint",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        self.kind = kind
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.notes: list[str] = []
        self.partial = self.out.with_name(f"{self.out.name}.partial-{os.getpid()}")
        self._lock = FolderLock(self.out)
        self._spare: list[int] = []

    def __enter__(self) -> Path:
        # Refuse before the lock file is made: nothing is written where nothing will be.
        self.refuse_existing()
        self._lock.__enter__()
        try:
            with resource_errors(self.out):
                clean_up(self.out)
                self.refuse_existing()
                self.partial.mkdir()
                # Kept for cleaning up when the block has used up all file handles.
                self._spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
        except BaseException:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._lock.__exit__(None, None, None)
            raise
        return self.partial

    def refuse_existing(self) -> None:
        """Raises what entering would raise for a folder that is there; for before work that comes first."""
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise UsageError("The output is not a folder.", where=str(self.out), hint="Choose another --out.")
        with resource_errors(self.out):
            occupied = self.out.is_dir() and any(self.out.iterdir())
        if occupied and not self.overwrite:
            hint = "Choose another --out, or pass --overwrite to replace it."
            raise UsageError("The output folder is not empty.", where=str(self.out), hint=hint)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # An OSError of the block (disk full in the caller's own file) is explained like one of ours.
            with resource_errors(self.out):
                if error is not None:
                    if isinstance(error, OSError):
                        raise error
                    return
                self._finish()
        finally:
            while self._spare:
                os.close(self._spare.pop())
            shutil.rmtree(self.partial, ignore_errors=True)
            self._lock.__exit__(None, None, None)

    def _finish(self) -> None:
        _sync_tree(self.partial)
        _fault_point("before-manifest")
        write_manifest(self.partial, self.kind, self.provenance)
        _fault_point("before-rename")
        try:
            _swap(self.partial, self.out)
        except OSError as error:
            if error.errno not in _CANNOT_RENAME:
                raise
            self._copy_manifest_last()
            reason = os.strerror(error.errno)
            self.notes.append(
                f"{self.out} was copied rather than renamed ({reason}); a crash during the copy leaves a folder "
                f"without {MANIFEST_FILE}, which every command refuses."
            )
        sync_file(self.out.parent)
        _fault_point("after-rename")

    def _copy_manifest_last(self) -> None:
        self.out.mkdir(exist_ok=True)
        (self.out / MANIFEST_FILE).unlink(missing_ok=True)
        sync_file(self.out)
        for path in self.out.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(
            self.partial, self.out, dirs_exist_ok=True, ignore=lambda folder, _: _manifest_of(folder, self.partial)
        )
        _sync_tree(self.out)
        _fault_point("before-copied-manifest")
        shutil.copy2(self.partial / MANIFEST_FILE, self.out / MANIFEST_FILE)
        _sync_tree(self.out)


def _manifest_of(folder: str, top: Path) -> set[str]:
    return {MANIFEST_FILE} if Path(folder) == top else set()


def clean_up(out: Path) -> None:
    """Remove what dead writers of `out` left, and restore the old folder if one died while swapping.

    The caller holds the lock of `out`.
    """
    for path in sorted(out.parent.glob(f"{_escape(out.name)}.old-*")):
        if _is_left_over(path):
            if not out.exists():
                os.rename(path, out)
            else:
                shutil.rmtree(path)
    for path in sorted(out.parent.glob(f"{_escape(out.name)}.partial-*")):
        if _is_left_over(path):
            shutil.rmtree(path)


def _is_left_over(path: Path) -> bool:
    pid = path.name.rpartition("-")[2]
    return (
        path.is_dir()
        and not path.is_symlink()
        and pid.isdigit()
        and (int(pid) == os.getpid() or not process_is_alive(int(pid)))
    )


def _escape(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in sorted(files):
            sync_file(Path(root) / name)
        sync_file(Path(root))


def _swap(new: Path, out: Path) -> None:
    """Give `new` the name `out`. If `out` exists it is replaced in one step where the system can, else in two."""
    if not out.exists():
        _rename(new, out)
        return
    if _exchange(new, out):
        return  # `new` now names the old folder, and the caller removes it
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    _rename(out, old)
    try:
        _rename(new, out)
    except BaseException:
        os.rename(old, out)
        raise
    shutil.rmtree(old)


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically (Linux renameat2 with RENAME_EXCHANGE); False where that cannot be."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0)
