"""A store in this process's memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from spec_rollout.cache.entry import GROUP_OVERHEAD_BYTES, Entry
from spec_rollout.cache.store import Groups, StoreSize


class _Group:
    """The entries of one prompt key, and the sum of their bytes."""

    __slots__ = ("num_bytes", "samples")

    def __init__(self) -> None:
        self.samples: dict[int, Entry] = {}
        self.num_bytes = GROUP_OVERHEAD_BYTES

    def put(self, sample_id: int, entry: Entry) -> None:
        self.drop(sample_id)
        self.samples[sample_id] = entry
        self.num_bytes += entry.num_bytes

    def drop(self, sample_id: int) -> None:
        entry = self.samples.pop(sample_id, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes


class _Content:
    """The groups in order of use, and the sum of their bytes. Not thread-safe."""

    def __init__(self) -> None:
        self.groups: OrderedDict[bytes, _Group] = OrderedDict()  # least recently used first
        self.num_bytes = 0

    def put(self, key: bytes, samples: Mapping[int, Entry], max_bytes: int | None) -> int:
        """Makes the group the most recently used and restores the bound; returns evictions."""
        if not samples:
            return 0
        group = self._take(key) or _Group()
        for sample_id, entry in samples.items():
            group.put(sample_id, entry)
        if max_bytes is not None and group.num_bytes > max_bytes:
            return 1
        self.groups[key] = group
        self.num_bytes += group.num_bytes
        return 0 if max_bytes is None else self.evict(max_bytes)

    def evict(self, max_bytes: int) -> int:
        evicted = 0
        while self.num_bytes > max_bytes:
            self._take(next(iter(self.groups)))
            evicted += 1
        return evicted

    def drop(self, key: bytes, sample_id: int, entry: Entry) -> bool:
        group = self.groups.get(key)
        if group is None or group.samples.get(sample_id) != entry:
            return False
        before = group.num_bytes
        group.drop(sample_id)
        self.num_bytes += group.num_bytes - before
        if not group.samples:
            self._take(key)
        return True

    def _take(self, key: bytes) -> _Group | None:
        group = self.groups.pop(key, None)
        if group is not None:
            self.num_bytes -= group.num_bytes
        return group


class MemoryStore:
    """`Store` in this process's memory, for its threads; gone with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._content = _Content()

    def size(self) -> StoreSize:
        """See `Store.size`."""
        with self._lock:
            groups = self._content.groups
            num_samples = sum(len(group.samples) for group in groups.values())
            return StoreSize(len(groups), num_samples, self._content.num_bytes)

    def get_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> list[Entry | None]:
        """See `Store.get_many`."""
        entries: list[Entry | None] = []
        with self._lock:
            groups, key, group = self._content.groups, None, None
            for row_key, sample_id in zip(prompt_keys, sample_ids, strict=True):
                if row_key != key:  # rows of a prompt mostly follow each other
                    key = row_key
                    group = groups.get(key)
                    if group is not None:
                        groups.move_to_end(key)
                entries.append(None if group is None else group.samples.get(sample_id))
        return entries

    @contextmanager
    def borrow_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> Iterator[list[Entry | None]]:
        """See `Store.borrow_many`."""
        yield self.get_many(prompt_keys, sample_ids)

    def put_many(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.put_many`. Other threads may come in between two groups."""
        evicted = 0
        for key, samples in groups:
            with self._lock:
                evicted += self._content.put(key, samples, max_bytes)
        return evicted

    def drop_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int], entries: Sequence[Entry]
    ) -> int:
        """See `Store.drop_many`."""
        rows = zip(prompt_keys, sample_ids, entries, strict=True)
        with self._lock:
            return sum(self._content.drop(*row) for row in rows)

    def evict(self, max_bytes: int) -> int:
        """See `Store.evict`."""
        with self._lock:
            return self._content.evict(max_bytes)

    def replace_all(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.replace_all`."""
        content = _Content()
        evicted = sum(content.put(key, samples, max_bytes) for key, samples in groups)
        with self._lock:
            self._content = content
        return evicted

    def iterate(self) -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
        """See `Store.iterate`."""
        with self._lock:
            groups = [(key, dict(group.samples)) for key, group in self._content.groups.items()]
        return iter(groups)
