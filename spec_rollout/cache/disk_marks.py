"""States of a disk store that can be brought back.

After a mark, the record of a group is kept before it is first changed (`Change.save_undo`), and so
are the segments that it names: they are immutable, so nothing is copied. A state is brought back by
putting these records in their places, from the newest mark to the one wanted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from spec_rollout.cache.disk_records import number, number_of
from spec_rollout.cache.disk_write import PLACE, Change

PLACE_BYTES = PLACE.size
_MARK = struct.Struct("<Q")  # the first segment after it


def add(change: Change) -> int:
    """A mark of the state of now."""
    numbers = _all(change)
    last = change.txn.get(b"last mark", db=change.shared.meta)
    mark = max([0 if last is None else number_of(last), *numbers]) + 1
    change.txn.put(b"last mark", number(mark), db=change.shared.meta)
    boundary = change.counters.next_segment
    change.txn.put(number(mark), _MARK.pack(boundary), db=change.shared.marks)
    change.counters = change.counters._replace(mark=mark, mark_segment=boundary)
    return mark


def roll_back(change: Change, mark: int) -> None:
    """See `DiskStore.roll_back`."""
    marks = _all(change)
    if mark not in marks:
        raise ValueError(f"mark: expected one of {marks}, got {mark}")
    for newer in sorted((m for m in marks if m >= mark), reverse=True):
        for key, record in _undo_of(change, newer):
            change.put_back(key[8:], record)
            change.txn.delete(key, db=change.shared.undo)
        if newer != mark:
            change.txn.delete(number(newer), db=change.shared.marks)
    _set_newest(change)


def keep(change: Change, kept: set[int]) -> None:
    """See `DiskStore.keep_marks`."""
    for mark in _all(change):
        if mark not in kept:
            _forget(change, mark)
    _set_newest(change)


def _forget(change: Change, mark: int) -> None:
    """Its records go to the mark before, which needs them if it has none of its own."""
    txn, shared = change.txn, change.shared
    marks = _all(change)
    older = max((m for m in marks if m < mark), default=None)
    newer = [m for m in marks if m > mark]
    for key, record in _undo_of(change, mark):
        index = key[8:]
        theirs = None if older is None else txn.get(number(older) + index, db=shared.undo)
        if older is not None and theirs is None:
            txn.put(number(older) + index, record, db=shared.undo)
        else:
            needed = change.segments_of(theirs)
            needed |= change.segments_of(_next_state(change, newer, index))
            change.delete(change.segments_of(record) - needed)
        txn.delete(key, db=shared.undo)
    txn.delete(number(mark), db=shared.marks)


def _next_state(change: Change, newer: list[int], index: bytes) -> bytes:
    """A group's record at the first of these marks that has one, or now."""
    for mark in newer:
        record = change.txn.get(number(mark) + index, db=change.shared.undo)
        if record is not None:
            return bytes(record)
    record = change.txn.get(index, db=change.shared.groups)
    return b"" if record is None else bytes(record)


def _all(change: Change) -> list[int]:
    """Marks, oldest first."""
    return [number_of(key) for key, _ in change.txn.cursor(change.shared.marks)]


def _set_newest(change: Change) -> None:
    newest = max(_all(change), default=0)
    boundary = 0
    if newest:
        record = change.txn.get(number(newest), db=change.shared.marks)
        (boundary,) = _MARK.unpack(b"" if record is None else record)
    change.counters = change.counters._replace(mark=newest, mark_segment=boundary)


def _undo_of(change: Change, mark: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and records kept for a mark; copies, as they are deleted meanwhile."""
    prefix, found = number(mark), []
    with change.txn.cursor(change.shared.undo) as cursor:
        if cursor.set_range(prefix):
            for key, value in cursor:
                if bytes(key[:8]) != prefix:
                    break
                found.append((bytes(key), bytes(value)))
    return iter(found)
