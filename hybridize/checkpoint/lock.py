"""One writer an output folder: a lock file beside it that a killed process cannot leave locked."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

from hybridize.checkpoint.resources import resource_errors
from hybridize.errors import UsageError


class FolderLock:
    """Holds ``OUT.lock``, which carries the process id of the writer.

    The lock is the kernel's (flock), so that it ends with the process; the recorded process is asked for as well, for
    file systems that have no flock.

    Raises:
        UsageError: a living process holds it.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out).absolute()
        self.path = self.out.with_name(self.out.name + ".lock")
        self._descriptor = -1

    def __enter__(self) -> FolderLock:
        with resource_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._descriptor < 0:
                self._descriptor = self._try()
        return self

    def _try(self) -> int:
        """A descriptor that holds the lock, or -1 if the file was replaced meanwhile."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            record = os.read(descriptor, 100).decode("ascii", "replace").split()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise self._held(record) from None
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                    raise
            record = os.pread(descriptor, 100, 0).decode("ascii", "replace").split()
            if _is_other_living_process(record):
                raise self._held(record)
            if not _is_same_file(descriptor, self.path):
                os.close(descriptor)
                return -1
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {process_start(os.getpid())}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _held(self, record: list[str]) -> UsageError:
        who = f"process {record[0]}" if record else "another process"
        hint = f"Wait for it or stop it, or choose another --out. (If it is gone, delete {self.path.name}.)"
        return UsageError(f"The output folder is being written by {who}.", where=str(self.out), hint=hint)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1


def process_is_alive(pid: int) -> bool:
    """Whether a process of this id runs on this machine."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True


def process_start(pid: int) -> str:
    """When the process began, in the kernel's ticks; "0" where that cannot be known. Tells reused ids apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19]
    except (OSError, IndexError):
        return "0"


def _is_other_living_process(record: list[str]) -> bool:
    if not record or not record[0].isdigit() or int(record[0]) == os.getpid():
        return False
    pid = int(record[0])
    started = record[1] if len(record) > 1 else "0"
    return process_is_alive(pid) and (started == "0" or process_start(pid) in (started, "0"))


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
