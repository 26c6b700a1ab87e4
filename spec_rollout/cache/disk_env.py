"""A disk store's folder: opened once per process, checked by whoever comes first, locked.

| file | holds |
| :-- | :-- |
| `data.mdb` | the database (LMDB): groups, order of use, segments, marks |
| `lock.mdb` | LMDB's own table of readers; made anew when nobody has the store open |
| `in-use` | locked, shared by all who have the store open, alone by who checks or compacts it |
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec_rollout.cache.disk_records import Counters, DamagedRecord
from spec_rollout.cache.store import StoreError
from spec_rollout.extras import install_command
from spec_rollout.files import replacing

if TYPE_CHECKING:
    import lmdb

DATA = "data.mdb"
IN_USE = "in-use"
LMDB_LOCK = "lock.mdb"
SCHEMA = b"spec-rollout disk store 2"
_CRC32_SCHEMA = b"spec-rollout disk store 1"
# Address space, not memory and not disk: the file is as long as what is in it.
_MAP_BYTES = 1 << 40
_PATIENCE_SECONDS = 60.0
_MOST_FILLED = 64 << 20
_MOST_READERS = 1024
_NAMES = ("meta", "groups", "order", "segments", "undo", "marks")

PathLike = str | os.PathLike[str]


def lmdb_module() -> Any:
    """The package lmdb; StoreError says how to install it."""
    try:
        import lmdb
        import lmdb.verify
    except ModuleNotFoundError:
        raise StoreError(
            "a store on disk wants the package lmdb (the extra disk), which is not installed: "
            f"{install_command('lmdb')}"
        ) from None
    return lmdb


class Shared:
    """What all stores of a process that have one folder open share.

    Attributes:
        sync: Whether a transaction is on the device when it ends.
        write_lock: Held by the thread of this process that writes; LMDB holds other processes off.
        touched: Keys of groups used since the last write, in the order of use, and its lock.
    """

    def __init__(self, path: Path, *, sync: bool, create: bool) -> None:
        self.path = path
        self.sync = sync
        self.write_lock = threading.Lock()
        self.touched: OrderedDict[bytes, None] = OrderedDict()
        self.touched_lock = threading.Lock()
        self.users = 0
        if create:
            _make_folder(path)
        elif not (path / DATA).is_file():
            raise StoreError(f"{path}: expected a disk store, found no {DATA} in it")
        self._lock = FolderLock(path)
        try:
            self._open(sync)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, sync: bool) -> None:
        lmdb = lmdb_module()
        if self._lock.alone:
            check_file(self.path)
            # Of processes that are gone; another version of LMDB may have made it.
            (self.path / LMDB_LOCK).unlink(missing_ok=True)
            # Before it is opened: sharing is letting go and taking again, and who gets it in
            # between removes the table, too.
            self._lock.share()
        with _errors(self.path, "open it"):
            self.env: Any = lmdb.open(
                os.fspath(self.path),
                map_size=_MAP_BYTES,
                max_dbs=len(_NAMES),
                max_readers=_MOST_READERS,
                sync=sync,
            )
        try:
            self._open_databases()
        except BaseException:
            self.env.close()
            raise

    def _open_databases(self) -> None:
        with _errors(self.path, "open it"), self.env.begin(write=True) as txn:
            databases = [self.env.open_db(name.encode(), txn=txn) for name in _NAMES]
            self.meta, self.groups, self.order, self.segments, self.undo, self.marks = databases
            schema = txn.get(b"schema", db=self.meta)
            if schema is None:
                txn.put(b"schema", SCHEMA, db=self.meta)
                txn.put(b"identity", uuid.uuid4().hex.encode(), db=self.meta)
                txn.put(b"counters", Counters().to_bytes(), db=self.meta)
            elif schema == _CRC32_SCHEMA:
                raise StoreError(
                    f"{self.path}: expected rollouts with checksums of CRC-32C, got a store of a "
                    "version before them (CRC-32): export it with that one (spec-rollout cache "
                    "export) and import the file, or remove the folder to begin without drafts"
                )
            elif schema != SCHEMA:
                raise StoreError(f"{self.path}: expected {SCHEMA!r}, got {bytes(schema)!r:.100}")
            self.identity = bytes(txn.get(b"identity", b"", db=self.meta)).decode()
            self.counters(txn)

    @contextmanager
    def reading(self) -> Iterator[lmdb.Transaction[memoryview]]:
        """A snapshot; what it gives are views, valid until it ends."""
        with _errors(self.path, "read it"), self.env.begin(buffers=True) as txn:
            yield txn

    @contextmanager
    def writing(self) -> Iterator[lmdb.Transaction[memoryview]]:
        """A transaction that is on the disk when the block ends, and undone if it raises."""
        with self.write_lock, _errors(self.path, "write it; it is as it was"):
            self.env.reader_check()
            with self.env.begin(write=True, buffers=True) as txn:
                yield txn

    def counters(self, txn: lmdb.Transaction[Any]) -> Counters:
        """Of a transaction's moment."""
        try:
            return Counters.from_bytes(txn.get(b"counters", b"", db=self.meta))
        except DamagedRecord as error:
            raise StoreError(f"{self.path}: {error}") from None

    def close(self) -> None:
        self.env.close()
        self._lock.release()


class FolderLock:
    """The lock of a store's folder; the operating system lifts it when the process ends.

    Attributes:
        alone: Nobody else has the store open.
    """

    def __init__(self, path: Path, *, must_be_alone: bool = False) -> None:
        self._file: int | None = os.open(path / IN_USE, os.O_RDWR | os.O_CREAT, 0o644)
        self.alone = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.alone = False
        if not self.alone and must_be_alone:
            self.release()
            raise StoreError(f"{path}: expected a store that no process has open, it is in use")
        if not self.alone:
            self._wait(path)
        _held.add(self)

    def _wait(self, path: Path) -> None:
        """For the shared lock: another may be checking or compacting."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                self._flock(fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.release()
                    raise StoreError(
                        f"{path}: expected a store that can be opened, another process checks or "
                        f"compacts it since {_PATIENCE_SECONDS:.0f} seconds"
                    ) from None
                time.sleep(0.02)

    def share(self) -> None:
        """Lets others open the store, too."""
        self._flock(fcntl.LOCK_SH)

    def _flock(self, how: int) -> None:
        assert self._file is not None
        fcntl.flock(self._file, how)

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def check_file(path: Path) -> None:
    """StoreError unless every page of a store that nobody has open is where it should be.

    LMDB believes its file; this reads it without LMDB. Rollouts are not read: their checksums are
    compared when they are looked up.
    """
    file = path / DATA
    if not file.exists() or file.stat().st_size == 0:  # a new one, or one killed when it began
        return
    verify = lmdb_module().verify
    try:
        problems = verify.verify(os.fspath(file), subdir=False)
    except verify.VerifyError as error:
        problems = [str(error)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StoreError(
            f"{file}: expected a sound database, got a damaged one: {problems[0]}{more}"
        )
    _fill_up(path)


def _fill_up(path: Path) -> None:
    """Zeros at the end of a file up to the last page that it says it has.

    A rollout's pages may be cut short where only the first of them was looked at, and a process
    that reads beyond the end of a mapped file is ended. Zeros fail the rollout's checksum. (Pages
    that a transaction took and gave back need not be in the file.)
    """
    with _errors(path, "open it"):
        env = lmdb_module().open(os.fspath(path), readonly=True, lock=False)
        try:
            expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        finally:
            env.close()
    size = (path / DATA).stat().st_size
    if expected > 2 * size + _MOST_FILLED:
        raise StoreError(
            f"{path / DATA}: expected {expected} bytes, got {size}: it was cut short, or says so"
        )
    if expected > size:
        os.truncate(path / DATA, expected)


def compact(path: PathLike) -> tuple[int, int]:
    """Writes the database anew without the room that is not used, and puts it in its place.

    The new file appears whole or not at all; whoever opens the store meanwhile waits.

    Returns:
        Bytes of the file before and after.

    Raises:
        StoreError: if a process has the store open, it is damaged, or it cannot be written.
    """
    place = Path(path).resolve()
    if not (place / DATA).is_file():
        raise StoreError(f"{path}: expected a disk store, found no {DATA} in it")
    lock = FolderLock(place, must_be_alone=True)
    try:
        for left in place.glob(f".{DATA}.*"):  # of one that was killed
            left.unlink()
        check_file(place)
        with _errors(place, "compact it; it is as it was"), replacing(place / DATA) as out:
            env = lmdb_module().open(os.fspath(place), map_size=_MAP_BYTES, max_dbs=len(_NAMES))
            try:
                before = (place / DATA).stat().st_size
                env.copyfd(out.fileno(), compact=True)
            finally:
                env.close()
        return before, (place / DATA).stat().st_size
    finally:
        lock.release()


def _make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path}: expected a folder or nothing, got a file")
    if path.is_dir() and not (path / DATA).exists():
        others = [name for name in sorted(os.listdir(path)) if name not in (IN_USE, LMDB_LOCK)]
        if others:
            raise StoreError(
                f"{path}: expected a disk store or an empty folder, found {others[0]!r}"
            )
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _errors(path: Path, what: str) -> Iterator[None]:
    """LMDB's errors as `StoreError`."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "lmdb":
            raise
        raise StoreError(f"{path}: cannot {what}: {error}") from error


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()
_open: dict[Path, Shared] = {}
_open_lock = threading.Lock()


def acquire(path: PathLike, *, sync: bool, create: bool) -> Shared:
    """The folder, opened once per process: LMDB wants it so.

    Raises:
        StoreError: if it cannot be opened, or is open in this process with less than `sync`.
    """
    with _open_lock:
        place = Path(path).resolve()
        shared = _open.get(place)
        if shared is None:
            shared = _open[place] = Shared(place, sync=sync, create=create)
        elif sync and not shared.sync:
            raise StoreError(
                f"{path}: expected a store that writes to the device (sync=True), it is open in "
                "this process as one that leaves that to the operating system (sync=False)"
            )
        shared.users += 1
        return shared


def give_back(shared: Shared) -> None:
    """Closes the folder when its last user has given it back."""
    with _open_lock:
        shared.users -= 1
        if shared.users == 0:
            if _open.get(shared.path) is shared:  # a forked child may have one of its own by now
                del _open[shared.path]
            shared.close()


def is_open(path: Path) -> bool:
    """In this process."""
    return path.resolve() in _open


def _after_fork() -> None:
    # A forked child may use no LMDB environment of its parent, and must not keep the store locked.
    # It may close the stores that it inherited, which writes nothing there, and open the folder
    # anew.
    global _open_lock
    _open_lock = threading.Lock()
    for lock in list(_held):
        with contextlib.suppress(OSError):
            lock.release()
    for shared in _open.values():
        shared.touched_lock = threading.Lock()
        shared.touched.clear()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)
