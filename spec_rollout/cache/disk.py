"""A store on disk, shared by the processes of a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

from spec_rollout.cache import disk_env, disk_marks
from spec_rollout.cache.disk_env import PathLike, Shared
from spec_rollout.cache.disk_records import (
    DamagedRecord,
    Group,
    entry_of,
    index_key,
    number,
    number_of,
)
from spec_rollout.cache.disk_write import Change
from spec_rollout.cache.entry import UNREADABLE, Entry
from spec_rollout.cache.store import Groups, StoreSize

if TYPE_CHECKING:
    import lmdb

# Groups used by lookups wait for the next write, which notes their order with it; so many wait.
_MOST_TOUCHED = 100_000


class DiskStore:
    """`Store` in a folder, for all processes of a machine; it outlives them.

    An embedded database (LMDB) holds it: readers never wait, writers take turns, and a batch is one
    transaction, which is there whole or not at all, whenever the process is killed or the disk is
    full. Needs the package lmdb (the extra `disk`).

    The order of use that lookups make is noted with the next write or `close`; a process that is
    killed before takes it along, and nothing else.

    Beside the promise of `Store` it can be *marked*: `mark` names its state, `roll_back` brings
    that back, order of use included. What a mark needs is kept beside what replaced it, until
    `keep_marks` lets it go.

    Args:
        path: The folder; not on a network file system. It is made if there is none.
        create: False expects a store there.
        sync: False leaves it to the operating system when to write to the device, unless this
            process has the folder open already. A killed process loses nothing then either; a
            machine that loses power may damage the store.

    Raises:
        StoreError: if there is something else at `path`, the store is damaged or cannot be read, it
            is wanted with `sync` and this process has it open without, or lmdb is not installed.
    """

    def __init__(self, path: PathLike, *, create: bool = True, sync: bool = True) -> None:
        self._held: Shared | None = disk_env.acquire(path, sync=sync, create=create)

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _shared(self) -> Shared:
        if self._held is None:
            raise ValueError("store: expected an open DiskStore, got one that was closed")
        return self._held

    @property
    def identity(self) -> str:
        """Which store this is, wherever its folder is moved."""
        return self._shared.identity

    def close(self) -> None:
        """Notes the order of use and closes the folder; does nothing the second time."""
        if self._held is not None:
            try:
                self._note_uses(self._held)
            finally:
                held, self._held = self._held, None
                disk_env.give_back(held)

    def size(self) -> StoreSize:
        """See `Store.size`."""
        with self._shared.reading() as txn:
            counters = self._shared.counters(txn)
        return StoreSize(counters.num_groups, counters.num_samples, counters.num_bytes)

    def file_bytes(self) -> int:
        """Of the database on the disk: what is held, what marks need, and room to be used again."""
        return (self._shared.path / disk_env.DATA).stat().st_size

    def get_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> list[Entry | None]:
        """See `Store.get_many`."""
        with self._shared.reading() as txn:
            entries = self._entries(txn, prompt_keys, sample_ids, borrowed=False)
        self._touch(prompt_keys)
        return entries

    @contextmanager
    def borrow_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> Iterator[list[Entry | None]]:
        """See `Store.borrow_many`: the arrays are views of the file."""
        with self._shared.reading() as txn:
            yield self._entries(txn, prompt_keys, sample_ids, borrowed=True)
        self._touch(prompt_keys)

    def put_many(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.put_many`. One transaction: if it fails, none of the groups was put."""
        with self._changing() as change:
            return sum(change.put(key, samples, max_bytes) for key, samples in groups)

    def drop_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int], entries: Sequence[Entry]
    ) -> int:
        """See `Store.drop_many`."""
        if not prompt_keys:
            return 0
        with self._changing() as change:
            rows = zip(prompt_keys, sample_ids, entries, strict=True)
            return sum(change.drop(*row) for row in rows)

    def evict(self, max_bytes: int) -> int:
        """See `Store.evict`."""
        with self._changing() as change:
            return change.evict(max_bytes)

    def replace_all(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.replace_all`."""
        with self._changing() as change:
            change.clear()
            return sum(change.put(key, samples, max_bytes) for key, samples in groups)

    def iterate(self) -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
        """See `Store.iterate`. Pages freed meanwhile are not used again before it ends."""
        self._note_uses(self._shared)
        return _groups_of(self._shared, self._shared.env.begin(buffers=True))

    def mark(self) -> int:
        """Names the state of now, flushed to the device; a number that `roll_back` takes."""
        with self._changing() as change:
            mark = disk_marks.add(change)
        self._shared.env.sync(True)
        return mark

    def marks(self) -> list[int]:
        """All marks, oldest first."""
        with self._shared.reading() as txn:
            return [number_of(key) for key, _ in txn.cursor(self._shared.marks)]

    def roll_back(self, mark: int) -> None:
        """Brings the state of a mark back; newer marks go.

        Raises:
            ValueError: if there is no such mark; nothing is changed then.
        """
        shared = self._shared
        with shared.writing() as txn:
            change = Change(shared, txn)
            disk_marks.roll_back(change, mark)
            change.finish()
        _taken(shared)  # uses since then

    def keep_marks(self, marks: Sequence[int]) -> None:
        """Forgets all other marks, and what only they needed."""
        with self._changing() as change:
            disk_marks.keep(change, set(marks))

    @contextmanager
    def _changing(self) -> Iterator[Change]:
        shared = self._shared
        with shared.writing() as txn:
            change = Change(shared, txn)
            touched = _taken(shared)
            try:
                for key in touched:
                    change.touch(key)
                yield change
                change.finish()
            except BaseException:
                with shared.touched_lock:
                    for key in touched:  # they are used all the same
                        shared.touched.setdefault(key)
                raise

    def _touch(self, prompt_keys: Sequence[bytes]) -> None:
        shared = self._shared
        with shared.touched_lock:
            for key, _ in groupby(prompt_keys):  # rows of a prompt mostly follow each other
                shared.touched[key] = None
                shared.touched.move_to_end(key)
            many = len(shared.touched) > _MOST_TOUCHED
        if many:
            self._note_uses(shared)

    def _note_uses(self, shared: Shared) -> None:
        if shared.touched:
            with self._changing():
                pass

    def _entries(
        self,
        txn: lmdb.Transaction[memoryview],
        prompt_keys: Sequence[bytes],
        sample_ids: Sequence[int],
        *,
        borrowed: bool,
    ) -> list[Entry | None]:
        shared = self._shared
        groups: dict[bytes, Group | DamagedRecord | None] = {}
        segments: dict[int, memoryview | None] = {}
        entries: list[Entry | None] = []
        for key, sample_id in zip(prompt_keys, sample_ids, strict=True):
            if key not in groups:
                groups[key] = _group(shared, txn, key)
            group = groups[key]
            if isinstance(group, DamagedRecord):
                entries.append(UNREADABLE)
                continue
            row = None if group is None else group.rows.get(sample_id)
            if row is None:
                entries.append(None)
                continue
            segment = row[4]
            if segment not in segments:
                segments[segment] = txn.get(number(segment), db=shared.segments)
            entries.append(entry_of(row, segments[segment], borrowed=borrowed))
        return entries


def _taken(shared: Shared) -> list[bytes]:
    """The groups used since the last write, which are forgotten here."""
    with shared.touched_lock:
        touched = list(shared.touched)
        shared.touched.clear()
    return touched


def _group(
    shared: Shared, txn: lmdb.Transaction[memoryview], key: bytes
) -> Group | DamagedRecord | None:
    record = txn.get(index_key(key), db=shared.groups)
    if record is None:
        return None
    try:
        return Group.from_bytes(record)
    except DamagedRecord as error:
        return error


def _groups_of(
    shared: Shared, txn: lmdb.Transaction[memoryview]
) -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
    """All groups of a snapshot in the order of use; damaged ones are left out."""
    with txn:
        for _, value in txn.cursor(shared.order):
            record = txn.get(value[disk_marks.PLACE_BYTES :], db=shared.groups)
            try:
                group = Group.from_bytes(b"" if record is None else record)
            except DamagedRecord:
                continue
            segments = {s: txn.get(number(s), db=shared.segments) for s in group.segments}
            yield (
                group.key,
                {
                    sample_id: entry_of(row, segments[row[4]], borrowed=False)
                    for sample_id, row in group.rows.items()
                },
            )
