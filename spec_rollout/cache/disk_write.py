"""What a transaction of a disk store changes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from spec_rollout.cache.disk_env import Shared
from spec_rollout.cache.disk_records import (
    SEGMENT,
    DamagedRecord,
    Group,
    Row,
    entry_of,
    index_key,
    moved,
    number,
    number_of,
    row_bytes,
    row_of,
    slice_of,
)
from spec_rollout.cache.entry import ENTRY_OVERHEAD_BYTES, UNREADABLE, Entry
from spec_rollout.cache.store import StoreError

if TYPE_CHECKING:
    import lmdb

# In the order of use, before the group's index key: its bytes and its number of samples, which are
# what has to be known of a group whose own record is damaged.
PLACE = struct.Struct("<QI")
# Samples that are put one by one leave a segment each; a group with more is written together.
_MOST_SEGMENTS = 16


class Change:
    """A transaction under way; `finish` notes the counters.

    Attributes:
        shared: The store's folder.
        txn: LMDB's transaction.
        counters: As they are by now.
    """

    def __init__(self, shared: Shared, txn: lmdb.Transaction[memoryview]) -> None:
        self.shared = shared
        self.txn = txn
        self.counters = shared.counters(txn)
        self._before = self.counters
        self._has_lost_segments = False

    def finish(self) -> None:
        if self._has_lost_segments:
            self._free_unnamed()
        if min(self.counters) < 0:
            raise StoreError(
                f"{self.shared.path}: expected sums of what is there, got {self.counters}: it is "
                "damaged (what is sound in it can be exported)"
            )
        if self.counters != self._before:
            self.txn.put(b"counters", self.counters.to_bytes(), db=self.shared.meta)

    def touch(self, key: bytes) -> None:
        """Makes a group the most recently used one, if there is such a group."""
        index = index_key(key)
        record = self.txn.get(index, db=self.shared.groups)
        if record is None:
            return
        try:
            group = Group.from_bytes(record)
        except DamagedRecord:
            return  # for who looked it up to drop
        if group.use + 1 != self.counters.next_use:
            self.write(index, group, remember=True)

    def put(self, key: bytes, samples: Mapping[int, Entry], max_bytes: int | None) -> int:
        """See `Store.put_many`."""
        if not samples:
            return 0
        index = index_key(key)
        group = self.read(index) or Group(key)
        replaced = {sample: group.rows[sample] for sample in samples if sample in group.rows}
        size = group.num_bytes - sum(map(_counted, replaced.values()))
        if max_bytes is not None and size + sum(e.num_bytes for e in samples.values()) > max_bytes:
            self.remove(index)
            return 1
        old = group.segments
        self._put_samples(group, samples, replaced)
        self.write(index, group, remember=True)
        self.free(old - group.segments)
        return 0 if max_bytes is None else self.evict(max_bytes)

    def _put_samples(
        self, group: Group, samples: Mapping[int, Entry], replaced: Mapping[int, Row]
    ) -> None:
        """Writes a segment of the new samples, and of old ones that would waste another's room."""
        segment, offset = self.counters.next_segment, 0
        parts: list[bytes | memoryview] = []
        for sample_id, row in self._to_move(group, samples, replaced).items():
            arrays = self._arrays(row)
            if arrays is None:
                continue  # it stays where it is, unreadable
            parts.append(arrays)
            group.rows[sample_id] = moved(row, segment, offset)
            offset += len(arrays)
        for sample_id, entry in samples.items():
            row = row_of(sample_id, entry, segment, offset)
            parts += entry.arrays
            group.rows[sample_id] = row
            offset += row_bytes(row)
        self.counters = self.counters._replace(next_segment=segment + 1)
        self.txn.put(number(segment), b"".join(parts), append=True, db=self.shared.segments)

    def _to_move(
        self, group: Group, samples: Mapping[int, Entry], replaced: Mapping[int, Row]
    ) -> dict[int, Row]:
        """Samples that stay, of segments of which less than half stays; or of all of them."""
        staying = {sample: row for sample, row in group.rows.items() if sample not in samples}
        if len({row[SEGMENT] for row in staying.values()}) >= _MOST_SEGMENTS:
            return staying
        moving: dict[int, Row] = {}
        for segment in {row[SEGMENT] for row in replaced.values()}:
            rows = {s: row for s, row in staying.items() if row[SEGMENT] == segment}
            data = self.txn.get(number(segment), db=self.shared.segments)
            if data is not None and 2 * sum(map(row_bytes, rows.values())) < len(data):
                moving.update(rows)
        return moving

    def _arrays(self, row: Row) -> bytes | None:
        """A copy: a view would not outlive the next change."""
        arrays = slice_of(row, self.txn.get(number(row[SEGMENT]), db=self.shared.segments))
        return None if arrays is None else bytes(arrays)

    def drop(self, key: bytes, sample_id: int, entry: Entry) -> int:
        """See `Store.drop_many`; a group whose record is damaged goes whole."""
        index = index_key(key)
        record = self.txn.get(index, db=self.shared.groups)
        if record is None:
            return 0
        try:
            group = Group.from_bytes(record)
        except DamagedRecord:
            if entry != UNREADABLE:
                return 0
            self.remove(index)
            return 1
        row = group.rows.get(sample_id)
        if row is None:
            return 0
        segment = self.txn.get(number(row[SEGMENT]), db=self.shared.segments)
        if entry_of(row, segment, borrowed=True) != entry:
            return 0
        del group.rows[sample_id]
        if group.rows:
            self.write(index, group, remember=False)
            if row[SEGMENT] not in group.segments:
                self.free({row[SEGMENT]})
        else:
            group.rows[sample_id] = row
            self.remove(index)
        return 1

    def evict(self, max_bytes: int) -> int:
        """See `Store.evict`."""
        evicted = 0
        while self.counters.num_bytes > max_bytes:
            with self.txn.cursor(self.shared.order) as cursor:
                if not cursor.first():
                    break
                use, index = bytes(cursor.key()), bytes(cursor.value()[PLACE.size :])
            self.remove(index)
            self.txn.delete(use, db=self.shared.order)  # damaged, it may lead to no group
            evicted += 1
        return evicted

    def clear(self) -> None:
        """Removes all groups."""
        with self.txn.cursor(self.shared.order) as cursor:
            indexes = [bytes(value[PLACE.size :]) for _, value in cursor]
        for index in indexes:
            self.remove(index)

    def read(self, index: bytes) -> Group | None:
        """The group of an index key. A damaged one is removed: what is put comes in its place."""
        record = self.txn.get(index, db=self.shared.groups)
        if record is None:
            return None
        try:
            return Group.from_bytes(record)
        except DamagedRecord:
            self.remove(index)
            return None

    def write(self, index: bytes, group: Group, *, remember: bool) -> None:
        """Writes a group's record in the place of the one that is there.

        Args:
            remember: Make it the most recently used group, too.
        """
        self.save_undo(index)
        self._leave(index)
        if remember:
            group.use = self.counters.next_use
            self.counters = self.counters._replace(next_use=group.use + 1)
        self._enter(index, group)

    def put_back(self, index: bytes, record: bytes) -> None:
        """Restores a group's record as it once was; empty is no group. A damaged one is lost."""
        there = self._segments_there(index)
        self._leave(index)
        group = self._sound(record)
        if group is not None:
            self._enter(index, group)
        self.delete(there - (set() if group is None else group.segments))

    def _enter(self, index: bytes, group: Group) -> None:
        shared, size = self.shared, group.num_bytes
        self.txn.put(index, group.to_bytes(), db=shared.groups)
        place = PLACE.pack(size, len(group.rows)) + index
        self.txn.put(number(group.use), place, db=shared.order)
        self._count(1, len(group.rows), size)

    def remove(self, index: bytes) -> None:
        """Removes a group."""
        self.save_undo(index)
        segments = self._segments_there(index)
        self._leave(index)
        self.free(segments)

    def _leave(self, index: bytes) -> None:
        """Takes a group out of the index, the order of use and the counters."""
        record = self.txn.get(index, db=self.shared.groups)
        if record is None:
            return
        try:
            group = Group.from_bytes(record)
        except DamagedRecord:
            use = self._place_of(index)
            place = None if use is None else self.txn.pop(number(use), db=self.shared.order)
            if place is not None:
                size, num_samples = PLACE.unpack_from(place)
                self._count(-1, -num_samples, -size)
        else:
            # By its own record, which has a checksum, and not by its place, which has none.
            self.txn.delete(number(group.use), db=self.shared.order)
            self._count(-1, -len(group.rows), -group.num_bytes)
        self.txn.delete(index, db=self.shared.groups)

    def _place_of(self, index: bytes) -> int | None:
        with self.txn.cursor(self.shared.order) as cursor:
            for key, value in cursor:
                if value[PLACE.size :] == index:
                    return int.from_bytes(key, "big")
        return None

    def _segments_there(self, index: bytes) -> set[int]:
        return self.segments_of(self.txn.get(index, db=self.shared.groups))

    def segments_of(self, record: bytes | memoryview | None) -> set[int]:
        """That a group's record names. Of a damaged one none: `finish` finds those left over."""
        group = self._sound(record)
        return set() if group is None else group.segments

    def _sound(self, record: bytes | memoryview | None) -> Group | None:
        """What a record says; None if it is empty or damaged."""
        try:
            return Group.from_bytes(record) if record else None
        except DamagedRecord:
            self._has_lost_segments = True
            return None

    def _free_unnamed(self) -> None:
        """Deletes the segments that no record names: of groups as they are or a mark has them."""
        named: set[int] = set()
        for database in (self.shared.groups, self.shared.undo):
            for _, record in self.txn.cursor(database):
                named |= self.segments_of(record)
        there = {number_of(key) for key, _ in self.txn.cursor(self.shared.segments)}
        for segment in there - named:
            self.txn.delete(number(segment), db=self.shared.segments)

    def _count(self, groups: int, samples: int, num_bytes: int) -> None:
        c = self.counters
        self.counters = c._replace(
            num_groups=c.num_groups + groups,
            num_samples=c.num_samples + samples,
            num_bytes=c.num_bytes + num_bytes,
        )

    def save_undo(self, index: bytes) -> None:
        """Before a group is first changed after a mark: what it was then."""
        mark = self.counters.mark
        if mark == 0:
            return
        key = number(mark) + index
        if self.txn.get(key, db=self.shared.undo) is None:
            record = self.txn.get(index, db=self.shared.groups)
            self.txn.put(key, b"" if record is None else bytes(record), db=self.shared.undo)

    def delete(self, segments: set[int]) -> None:
        """Deletes segments that no record names any more.

        Where a record could not be read, nobody knows that of single ones; `finish` sees to all.
        """
        if not self._has_lost_segments:
            for segment in segments:
                self.txn.delete(number(segment), db=self.shared.segments)

    def free(self, segments: set[int]) -> None:
        """Deletes segments that no group has any more, unless a mark may need them."""
        counters = self.counters
        for segment in segments:
            if counters.mark == 0 or segment >= counters.mark_segment:
                self.txn.delete(number(segment), db=self.shared.segments)


def _counted(row: Row) -> int:
    return ENTRY_OVERHEAD_BYTES + row_bytes(row)
