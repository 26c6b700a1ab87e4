"""States of a disk store that are brought back, against copies of its content."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from cache_samples import (
    check_integrity,
    check_segments,
    content_of,
    damage_group,
    entry_of,
    put,
    rows_of,
)
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

from spec_rollout.cache import DiskStore, RolloutCache
from spec_rollout.cache.entry import Entry

A, B = b"prompt-a", b"prompt-b"


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


@pytest.mark.slow
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
        put(store, B, 0)
        store.get_many([A], [0])  # noted with the next write
        with pytest.raises(ValueError, match=r"expected one of \[\]"):
            store.roll_back(mark)
        assert [key for key, _ in content_of(store)] == [B, A]
        assert before != content_of(store)
        assert store.mark() > mark  # a number is not used again


@pytest.mark.parametrize("then", ["look up", "put", "evict", "nothing"])
def test_a_record_that_is_damaged_after_a_mark_is_all_that_is_not_brought_back(
    tmp_path: Path, then: str
) -> None:
    with DiskStore(tmp_path / "store", sync=False) as store:
        put(store, A, 0, 1)
        put(store, B, 0)
        mark = store.mark()
        damage_group(store, A)
        if then == "look up":
            drafts = RolloutCache(store=store).lookup([A, B], [0, 0], max_tokens=99)
            assert rows_of(drafts) == [[], [1] * 10]
        elif then == "put":
            put(store, A, 5)
        elif then == "evict":
            store.evict(0)
        store.roll_back(mark)
        assert content_of(store) == [(B, {0: entry_of(B, 0, [1] * 10)})]
        put(store, A, 7)
        check_integrity(store)
        store.roll_back(mark)
        assert [key for key, _ in content_of(store)] == [B]
        check_integrity(store)
        store.keep_marks([])
        check_segments(store)


@pytest.mark.parametrize("kept", [[0], [1], [0, 1], []])
def test_a_damaged_record_of_a_mark_harms_no_other(tmp_path: Path, kept: list[int]) -> None:
    """Its segments are partly those of the other marks, and of now."""
    with DiskStore(tmp_path / "store", sync=False) as store:
        put(store, B, 0)
        marks, copies = [], []
        for sample in range(3):
            put(store, A, sample)
            copies.append(content_of(store))
            marks.append(store.mark())
        put(store, A, 3)
        copies.append(content_of(store))
        damage_group(store, A, marks[1])
        store.keep_marks([marks[m] for m in kept])
        assert content_of(store) == copies[3]
        if 1 not in kept:
            check_segments(store)
        for mark in reversed(kept):
            store.roll_back(marks[mark])
            assert content_of(store) == ([copies[0][0]] if mark else copies[0])
            check_integrity(store)
            check_segments(store)
