"""Stores made of parts: which part has a key, what is per part, what is asked of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_samples import LocalParts, check_integrity, content_of, entry_of, put

from spec_rollout.cache import DiskStore, MemoryStore, Store, StoreError, part, parted
from spec_rollout.cache.entry import UNREADABLE, Entry, group_bytes
from spec_rollout.cache.messages import (
    packed_entries,
    packed_groups,
    packed_keys,
    unpacked_entries,
    unpacked_groups,
    unpacked_keys,
)
from spec_rollout.cache.parted import part_of

KEYS = [b"prompt %d" % number for number in range(24)]
ONE = group_bytes({0: entry_of(b"", 0, [1] * 10)})


def fill(store: LocalParts, num_samples: int = 1) -> dict[bytes, dict[int, Entry]]:
    groups = {key: {s: entry_of(key, s, [1] * 10) for s in range(num_samples)} for key in KEYS}
    assert store.put_many(groups.items()) == 0
    return groups


def test_a_key_falls_to_the_same_part_in_every_process_and_version() -> None:
    assert [part_of(key, 4) for key in KEYS[:8]] == [1, 0, 0, 1, 3, 2, 2, 3]
    assert part_of(b"\0" * 5000, 1000) == 6
    shares = Counter(part_of(bytes([a, b]), 4) for a in range(64) for b in range(64))
    assert all(900 < share < 1150 for share in shares.values())  # of 4096


def test_keys_and_entries_come_out_as_they_went_in() -> None:
    keys = [b"a", b"a", b"\0" * 700, b"a", b"b", b"b"]
    assert unpacked_keys(packed_keys(keys)) == keys
    assert unpacked_keys(packed_keys([])) == []
    bits = np.random.default_rng(0).integers(0, 256, 64, dtype=np.uint8).tobytes()
    entries = [
        None,
        Entry(bits, bits[:60], None, 255, -(2**63), 2**32 - 1, bits[4:], bits[:32]),
        UNREADABLE,
        Entry(b"", None, b"", 0, 2**63 - 1, 0),
    ]
    packed = packed_entries([5, 2**63 - 1, 0, 7], entries)
    for borrowed in (False, True):
        assert unpacked_entries(packed, borrowed=borrowed) == entries
    assert unpacked_entries(packed_entries([], []), borrowed=False) == []
    groups = [
        (b"a", {1: entries[1], 9: entries[3]}),
        (b"b", {0: UNREADABLE}),
        (b"a", {1: entries[3]}),
    ]
    assert list(unpacked_groups(*packed_groups(groups), borrowed=False)) == groups
    assert list(unpacked_groups(*packed_groups([]), borrowed=True)) == []


def test_entries_that_point_outside_of_what_came_are_unreadable() -> None:
    rows, flat = packed_entries([0, 1], [entry_of(b"a", 0, [1, 2]), entry_of(b"a", 1, [3])])
    found = unpacked_entries((rows, flat[:-1]), borrowed=False)
    assert found == [entry_of(b"a", 0, [1, 2]), UNREADABLE]


def test_every_call_asks_each_part_that_it_concerns_once() -> None:
    store = LocalParts(3)
    groups = fill(store)
    assert store.asked == [dict.fromkeys(range(3), "put")]
    store.asked.clear()
    shuffled = [KEYS[row] for row in np.random.default_rng(0).permutation(len(KEYS))] * 2
    assert store.get_many(shuffled, [0] * 48) == [groups[key][0] for key in shuffled]
    assert store.drop_many(KEYS[:1], [0], [groups[KEYS[0]][0]]) == 1
    assert store.get_many(KEYS[1:2], [3]) == [None]
    assert store.evict(10**9) == 0
    assert store.asked == [
        dict.fromkeys(range(3), "get"),
        {part_of(KEYS[0], 3): "drop"},
        {part_of(KEYS[1], 3): "get"},
        dict.fromkeys(range(3), "evict"),
    ]


def test_each_part_keeps_an_order_and_its_share_of_the_bound() -> None:
    store = LocalParts(3)
    fill(store)
    by_part = [[key for key in KEYS if part_of(key, 3) == p] for p in range(3)]
    used = by_part[0][0]
    store.get_many([used], [0])
    num_held = [min(len(keys), 3) for keys in by_part]
    assert store.evict(9 * ONE + 2) == len(KEYS) - sum(num_held)
    held = [key for key, _ in store.iterate()]
    for p, keys in enumerate(by_part):
        order = [*keys, used] if p == 0 else keys
        assert [key for key in held if part_of(key, 3) == p] == order[-num_held[p] :]
    check_integrity(store)
    # A group over the share of its part goes, though there is room in the others.
    big = {0: entry_of(by_part[1][0], 0, [1] * 400)}
    assert group_bytes(big) > 3 * ONE
    assert store.put_many([(by_part[1][0], big)], max_bytes=9 * ONE) == 1


def test_the_groups_of_all_parts_come_in_turn() -> None:
    """So that the first ones are about those that were used least recently."""
    store = LocalParts(3)
    groups = fill(store)
    places = [KEYS.index(key) for key, _ in store.iterate()]
    assert sorted(places) == list(range(24))
    assert max(abs(place - index) for index, place in enumerate(places)) <= 8
    assert dict(content_of(store)) == groups


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_read_page_by_page_is_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    monkeypatch.setattr(part, "_PAGE_BYTES", 3 * ONE)
    folders = iter(range(2))

    def open_store() -> Store:
        return DiskStore(tmp_path / str(next(folders)), sync=False) if on_disk else MemoryStore()

    store = LocalParts(2, open_store)
    groups = fill(store)
    reading = store.iterate()
    seen = [next(reading)]
    assert store.asked[-1] != {"page": 1}
    put(store, KEYS[-1], 5)
    put(store, b"another", 0)
    store.drop_many([KEYS[10]], [0], [groups[KEYS[10]][0]])
    seen += reading
    assert dict(seen) == groups
    assert len(seen) == len(groups)
    assert sum("page" in call.values() for call in store.asked) >= 6
    assert [p._readings for p in store.parts] == [{}, {}]
    check_integrity(store)


class Asked(LocalParts):
    """Where every answer but the last one to some methods gets lost, and they are asked again."""

    def _ask(self, calls):  # type: ignore[no-untyped-def]
        if not any(call[0] in ("begin", "page", "end") for call in calls.values()):
            return super()._ask(calls)
        return [super(Asked, self)._ask(calls) for _ in range(3)][-1]


def test_a_page_that_is_asked_for_again_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks again where it does not know whether a call was done."""
    monkeypatch.setattr(part, "_PAGE_BYTES", 3 * ONE)
    store = Asked(2)
    groups = fill(store)
    seen = content_of(store)
    assert dict(seen) == groups
    assert len(seen) == len(groups)
    assert [p._readings for p in store.parts] == [{}, {}]
    _, page = store.parts[0].begin("token")
    with pytest.raises(StoreError, match="expected page 0 or the next, got 2"):
        store.parts[0].page("token", 2)
    assert store.parts[0].page("token", 0) is page


def test_groups_that_get_lost_on_the_way_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "_PAGE_BYTES", 3 * ONE)
    store = LocalParts(1)
    fill(store)
    ask = store._ask

    def losing(calls):  # type: ignore[no-untyped-def]
        answers = ask(calls)
        if calls[0][0] == "page":
            answers = ask({0: ("page", calls[0][1], 2)})
        return answers

    monkeypatch.setattr(store, "_ask", losing)
    with pytest.raises(StoreError, match="expected 9 groups of part 0 so far, got 6"):
        list(store.iterate())


def test_a_reading_that_is_ended_early_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "_PAGE_BYTES", ONE)
    store = LocalParts(2)
    fill(store)
    reading = store.iterate()
    next(reading)
    assert [len(p._readings) for p in store.parts] == [1, 1]
    del reading
    assert [len(p._readings) for p in store.parts] == [0, 0]


def test_of_readings_that_nobody_ends_the_oldest_are_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(part, "_PAGE_BYTES", ONE)
    store = LocalParts(1)
    groups = fill(store)
    readings = [store.iterate() for _ in range(part._MOST_UNDER_WAY + 1)]
    first = readings.pop(0)
    next(first)
    with pytest.raises(StoreError, match="got one that was given up"):
        list(first)
    assert all(dict(reading) == groups for reading in readings)


def test_what_a_killed_process_had_begun_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A snapshot that nobody reads on would keep all that is replaced from then on."""
    monkeypatch.setattr(part, "_PAGE_BYTES", ONE)
    now = 0.0
    with DiskStore(tmp_path / "store", sync=False) as store:
        held = part.Part(lambda: store, clock=lambda: now)
        groups = [(key, {0: entry_of(key, 0, [1] * 100_000)}) for key in KEYS[:2]]
        held.put(*packed_groups(groups), None)
        _, (*_, is_last) = held.begin("of one that was killed")
        assert not is_last
        held.stage("of another", *packed_groups(groups))
        now = part._MOST_SECONDS
        held.put(*packed_groups(groups), None)
        assert not held.page("of one that was killed", 1)[-1]
        now += part._MOST_SECONDS + 1
        for _ in range(30):  # of 1.6 MB each
            held.put(*packed_groups(groups), None)
        with pytest.raises(StoreError, match="got one that was given up"):
            held.page("of one that was killed", 2)
        with pytest.raises(StoreError, match=r"expected 2 groups .* got 0"):
            held.commit("of another", 2, None)
        assert store.file_bytes() < 12 << 20


def test_what_is_put_is_sent_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory is bounded: groups are made as they are asked for."""
    monkeypatch.setattr(parted, "_PIECE_BYTES", 8 * ONE)
    store = LocalParts(2)
    num_made = 0
    most = 0

    def groups() -> Iterator[tuple[bytes, dict[int, Entry]]]:
        nonlocal num_made, most
        for key in KEYS:
            num_made += 1
            most = max(most, num_made - store.parts[0].size()[0] - store.parts[1].size()[0])
            yield key, {0: entry_of(key, 0, [1] * 10)}

    assert store.put_many(groups()) == 0
    assert store.size().num_groups == 24
    assert most <= 9
    assert sum("put" in call.values() for call in store.asked) == 3
    assert store.replace_all(groups()) == 0
    assert store.size().num_groups == 24
    check_integrity(store)


class Failing(LocalParts):
    """Whose part 1 fails in a method."""

    def __init__(self, method: str) -> None:
        super().__init__(3)
        self.method = method
        self.fails = False

    def _ask(self, calls):  # type: ignore[no-untyped-def]
        answers = super()._ask(
            {p: c for p, c in calls.items() if not (self.fails and p == 1 and c[0] == self.method)}
        )
        if len(answers) < len(calls):
            raise StoreError("part 1: no room")
        return answers


def test_where_a_part_fails_no_part_is_replaced_before_all_have_everything() -> None:
    store = Failing("stage")
    fill(store)
    before, store.fails = content_of(store), True
    with pytest.raises(StoreError, match="part 1: no room"):
        store.replace_all((key, {7: entry_of(key, 7, [2])}) for key in KEYS)
    assert content_of(store) == before
    assert [p._staged for p in store.parts] == [{}, {}, {}]


def test_where_a_part_fails_the_others_put_whole_groups() -> None:
    store = Failing("put")
    groups = fill(store, num_samples=3)
    store.fails = True
    with pytest.raises(StoreError, match="part 1: no room"):
        store.put_many((key, {0: entry_of(key, 0, [2])}) for key in KEYS)
    for key, samples in content_of(store):
        new = {**groups[key], 0: entry_of(key, 0, [2])}
        assert samples == (groups[key] if part_of(key, 3) == 1 else new)
    check_integrity(store)


def test_what_a_part_has_lost_does_not_replace_what_it_holds() -> None:
    """It was started again between being handed the groups and being told to take them."""
    store = LocalParts(1)
    fill(store)
    before = content_of(store)
    groups = packed_groups([(KEYS[0], {7: entry_of(KEYS[0], 7, [2])})])
    store.parts[0].stage("token", *groups)
    with pytest.raises(StoreError, match=r"expected 2 groups .* got 1: they were given up"):
        store.parts[0].commit("token", 2, None)
    with pytest.raises(StoreError, match=r"expected 1 groups .* got 0"):
        store.parts[0].commit("token", 1, None)
    assert content_of(store) == before


@pytest.mark.parametrize("on_disk", [False, True])
def test_borrowed_entries_are_views_and_others_are_copies(tmp_path: Path, on_disk: bool) -> None:
    store = LocalParts(
        1, (lambda: DiskStore(tmp_path / "s", sync=False)) if on_disk else MemoryStore
    )
    put(store, KEYS[0], 0)
    with store.borrow_many([KEYS[0]], [0]) as (entry,):
        assert entry is not None
        assert isinstance(entry.token_ids, memoryview)
    (entry,) = store.get_many([KEYS[0]], [0])
    assert entry is not None
    assert isinstance(entry.token_ids, bytes)
    (_, samples), = store.iterate()  # fmt: skip
    assert isinstance(samples[0].token_ids, bytes)


def test_a_store_that_cannot_be_opened_is_the_answer_of_every_call() -> None:
    store = LocalParts(1, lambda: DiskStore("/dev/null/x"))
    for _ in range(2):
        with pytest.raises(OSError, match="/dev/null/x"):
            store.size()
