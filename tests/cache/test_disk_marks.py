"""States of a disk store that are brought back, against copies of its content."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from cache_samples import check_integrity, content_of, entry_of, put
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_store_properties import BOUNDS, GROUPS, ROWS, Groups

from spec_rollout.cache import DiskStore
from spec_rollout.cache.disk_records import Group, number_of
from spec_rollout.cache.entry import Entry

A, B = b"prompt-a", b"prompt-b"


def check_segments(store: DiskStore) -> None:
    """Every segment that is there is named by a group or for a mark, and the other way round."""
    shared = store._shared
    with shared.reading() as txn:
        records = [value for _, value in txn.cursor(shared.groups)]
        records += [value for _, value in txn.cursor(shared.undo) if len(value)]
        named = set().union(*(Group.from_bytes(record).segments for record in records))
        assert {number_of(key) for key, _ in txn.cursor(shared.segments)} == named
        if not store.marks():
            assert txn.stat(shared.undo)["entries"] == 0


class MarksMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = DiskStore(Path(self.folder.name) / "store", sync=False)
        self.copies: dict[int, list[tuple[bytes, dict[int, Entry]]]] = {}

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @rule(groups=GROUPS, max_bytes=st.none() | BOUNDS)
    def put_many(self, groups: Groups, max_bytes: int | None) -> None:
        self.store.put_many(groups, max_bytes)

    @rule(rows=ROWS)
    def get_many(self, rows: list[tuple[bytes, int]]) -> None:
        self.store.get_many([row[0] for row in rows], [row[1] for row in rows])

    @rule(rows=ROWS)
    def drop_what_is_there(self, rows: list[tuple[bytes, int]]) -> None:
        keys, ids = [row[0] for row in rows], [row[1] for row in rows]
        there = [
            row for row in zip(keys, ids, self.store.get_many(keys, ids), strict=True) if row[2]
        ]
        if there:
            self.store.drop_many(*zip(*there, strict=True))

    @rule(max_bytes=BOUNDS)
    def evict(self, max_bytes: int) -> None:
        self.store.evict(max_bytes)

    @rule()
    def mark(self) -> None:
        self.copies[self.store.mark()] = content_of(self.store)

    @rule(data=st.data())
    @precondition(lambda self: self.copies)
    def roll_back(self, data: st.DataObject) -> None:
        mark = data.draw(st.sampled_from(sorted(self.copies)))
        self.store.roll_back(mark)
        assert content_of(self.store) == self.copies[mark]
        self.copies = {m: copy for m, copy in self.copies.items() if m <= mark}

    @rule(data=st.data())
    @precondition(lambda self: self.copies)
    def keep_marks(self, data: st.DataObject) -> None:
        kept = data.draw(st.sets(st.sampled_from(sorted(self.copies))))
        self.store.keep_marks(sorted(kept))
        self.copies = {m: copy for m, copy in self.copies.items() if m in kept}

    @invariant()
    def nothing_is_lost_or_left(self) -> None:
        if hasattr(self, "store"):
            assert self.store.marks() == sorted(self.copies)
            check_integrity(self.store)
            check_segments(self.store)


def test_marks_bring_back_what_was() -> None:
    run_state_machine_as_test(
        MarksMachine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None)
    )


def test_what_is_stored_after_a_mark_does_not_show_when_it_is_brought_back(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        put(store, A, 0, 1)
        put(store, B, 0)
        before = content_of(store)
        mark = store.mark()
        store.get_many([A], [0])
        store.put_many([(A, {0: entry_of(A, 0, [7] * 50)})], max_bytes=1500)
    with DiskStore(tmp_path / "store") as store:  # and not only in the process that marked it
        assert content_of(store) != before
        store.roll_back(mark)
        assert content_of(store) == before
        store.roll_back(mark)  # as often as one likes
        assert content_of(store) == before


def test_a_mark_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        put(store, A, 0)
        mark = store.mark()
        before = content_of(store)
        put(store, A, 1)
        with pytest.raises(ValueError, match=rf"mark: expected one of \[{mark}\], got 9"):
            store.roll_back(9)
        assert [list(samples) for _, samples in content_of(store)] == [[0, 1]]
        store.keep_marks([])
        with pytest.raises(ValueError, match=r"expected one of \[\]"):
            store.roll_back(mark)
        assert before != content_of(store)
        assert store.mark() > mark  # a number is not used again
