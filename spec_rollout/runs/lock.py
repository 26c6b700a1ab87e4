"""One process at a time works on a run."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import weakref
from datetime import UTC, datetime
from pathlib import Path

LOCK = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class RunInUseError(ValueError):
    """Another process works on the run; the message says which."""


class RunLock:
    """The file run.lock in a run's folder, locked by the process that works on the run.

    The operating system lifts the lock when the process ends, however it ends; what the file says
    is only for the message to others. Whoever only reads the run needs no lock.

    Attributes:
        note: Why there is no lock, for a file system that has none; else None.
    """

    def __init__(self, run_dir: Path, key: str) -> None:
        """Takes the lock; the file is gone again after `release`.

        Args:
            run_dir: An existing folder.
            key: What named the folder, for the message.

        Raises:
            RunInUseError: if another has it, in this process or another.
        """
        self.note: str | None = None
        self._path = run_dir / LOCK
        self._file: int | None = None
        while self._file is None:
            self._file = self._take(f"{key}: expected a run that no process works on, got ")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()} (since {now})\n"
        os.truncate(self._file, 0)
        os.pwrite(self._file, holder.encode(), 0)
        _held.add(self)

    def _take(self, expected: str) -> int | None:
        """The locked file; None if it was removed between opening and locking it."""
        number = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(number), os.stat(self._path)):
                return number
        except BlockingIOError:
            holder = os.pread(number, 200, 0).decode(errors="replace").strip()
            os.close(number)
            raise RunInUseError(
                f"{expected}{str(self._path.parent)!r}, on which {holder or 'another process'} "
                "works"
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self.note = (
                    f"{self._path.parent}: its file system has no locks ({error.strerror}); see to "
                    "it that no other process works on this run"
                )
                return number
            os.close(number)
            raise
        os.close(number)
        return None

    def release(self) -> None:
        """Lets others work on the run; does nothing the second time."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked process that outlives this one would keep the lock. Closing does not lift it here.
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_close_in_child)
