"""Records of a disk store: what was written comes back, and anything else is refused."""

from __future__ import annotations

import pytest
from cache_samples import entry_of as sample
from hypothesis import example, given
from hypothesis import strategies as st

from spec_rollout.cache.disk_records import (
    Counters,
    DamagedRecord,
    Group,
    entry_of,
    index_key,
    moved,
    row_bytes,
    row_of,
    sealed,
)
from spec_rollout.cache.entry import UNREADABLE, Entry

INTS = st.integers(-(2**63), 2**63 - 1)
ROWS = st.lists(st.lists(INTS, min_size=11, max_size=11), max_size=4, unique_by=lambda row: row[0])
ARRAYS = st.none() | st.binary(max_size=40)
ENTRIES = st.builds(
    Entry, st.binary(max_size=40), ARRAYS, ARRAYS, st.integers(0, 255), INTS, INTS, ARRAYS, ARRAYS
)


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1), ROWS)
def test_a_group_comes_back(key: bytes, use: int, rows: list[list[int]]) -> None:
    group = Group.from_bytes(Group(key, use, rows).to_bytes())
    assert (group.key, group.use, list(group.rows.values())) == (key, use, rows)


@given(st.binary(max_size=300), st.booleans())
@example(b"", True)
def test_anything_else_is_refused(data: bytes, with_checksum: bool) -> None:
    for record in (Group, Counters):
        try:
            again = record.from_bytes(sealed(data) if with_checksum else data)
        except DamagedRecord:
            continue
        assert with_checksum
        assert again.to_bytes()[4:] == data


@given(st.data())
def test_a_flipped_bit_is_noticed(data: st.DataObject) -> None:
    record = bytearray(Group(b"key", 7, [list(range(11))]).to_bytes())
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedRecord):
        Group.from_bytes(bytes(record))


@given(ENTRIES, st.binary(max_size=9), st.booleans())
def test_an_entry_is_found_where_its_row_says(entry: Entry, before: bytes, borrowed: bool) -> None:
    segment = before + b"".join(entry.arrays)
    row = row_of(3, entry, 5, len(before))
    assert row_bytes(row) == len(segment) - len(before)
    assert entry_of(row, memoryview(segment), borrowed=borrowed) == entry
    elsewhere = memoryview(b"".join(entry.arrays))
    assert entry_of(moved(row, 6, 0), elsewhere, borrowed=borrowed) == entry
    assert entry_of(row, None, borrowed=borrowed) is UNREADABLE
    if len(segment) > len(before):
        assert entry_of(row, memoryview(segment[:-1]), borrowed=borrowed) is UNREADABLE


@given(st.lists(INTS, min_size=11, max_size=11), st.binary(max_size=64))
def test_a_row_that_leads_nowhere_is_unreadable(row: list[int], segment: bytes) -> None:
    entry = entry_of(row, memoryview(segment), borrowed=False)
    assert entry == UNREADABLE or sum(map(len, entry.arrays)) <= len(segment)


def test_keys_are_found_by_what_is_short_and_their_own() -> None:
    keys = [b"a", b"ka", b"x" * 64, b"x" * 65, b"x" * 66, bytes(5000)]
    assert len({index_key(key) for key in keys}) == len(keys)
    assert max(len(index_key(key)) for key in keys) <= 65
    assert sample(b"a", 0, [1]).num_bytes == 256 + row_bytes(row_of(0, sample(b"a", 0, [1]), 0, 0))
