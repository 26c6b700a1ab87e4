"""Every store against a model of it: an ordered dict with the promises of `Store` written out
plainly."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cache_samples import STORE_KINDS, check_integrity, content_of, entry_of, open_store
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from spec_rollout.cache.entry import UNREADABLE, Entry, group_bytes
from spec_rollout.cache.parted import PartedStore, part_of

KEYS = st.sampled_from([b"\0", b"\0\0", b"key", b"k" * 600, b"\xff" * 16])
SAMPLE_IDS = st.sampled_from([0, 1, 2, 2**63 - 1])
ROWS = st.lists(st.tuples(KEYS, SAMPLE_IDS), max_size=8)
BOUNDS = st.integers(0, 5000)
# Few different entries, so that one is often put or dropped where its equal is.
ENTRIES = st.builds(
    entry_of,
    st.just(b"any key"),
    st.just(0),
    st.sampled_from([[1], [2], [3] * 50, [4] * 150]),
    logprobs=st.booleans(),
) | st.just(UNREADABLE)
GROUPS = st.lists(
    st.tuples(KEYS, st.dictionaries(SAMPLE_IDS, ENTRIES, max_size=3)),
    max_size=5,
)  # keys may repeat, groups may be empty

Groups = list[tuple[bytes, dict[int, Entry]]]


class Model:
    """The groups, least recently used first."""

    def __init__(self) -> None:
        self.groups: OrderedDict[bytes, dict[int, Entry]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(map(group_bytes, self.groups.values()))

    def put(self, groups: Groups, max_bytes: int | None) -> int:
        evicted = 0
        for key, samples in groups:
            if not samples:
                continue
            self.groups.setdefault(key, {}).update(samples)
            self.groups.move_to_end(key)
            if max_bytes is None:
                continue
            if group_bytes(self.groups[key]) > max_bytes:
                del self.groups[key]
                evicted += 1
            else:
                evicted += self.evict(max_bytes)
        return evicted

    def evict(self, max_bytes: int) -> int:
        evicted = 0
        while self.num_bytes > max_bytes:
            self.groups.popitem(last=False)
            evicted += 1
        return evicted

    def get(self, key: bytes, sample_id: int) -> Entry | None:
        if key in self.groups:
            self.groups.move_to_end(key)
        return self.groups.get(key, {}).get(sample_id)

    def drop(self, key: bytes, sample_id: int, entry: Entry) -> int:
        if self.groups.get(key, {}).get(sample_id) != entry:
            return 0
        del self.groups[key][sample_id]
        if not self.groups[key]:
            del self.groups[key]
        return 1


class StoreMachine(RuleBasedStateMachine):
    """A store beside models: one, or one for each part with its share of the bound."""

    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.open = ExitStack()

    @initialize()
    def start(self) -> None:
        folder = Path(self.open.enter_context(tempfile.TemporaryDirectory()))
        self.store = self.open.enter_context(open_store(self.kind, folder))
        num_parts = self.store.num_parts if isinstance(self.store, PartedStore) else 1
        self.models = [Model() for _ in range(num_parts)]

    def teardown(self) -> None:
        self.open.close()

    def model_of(self, key: bytes) -> Model:
        return self.models[part_of(key, len(self.models))]

    def put_into_models(self, groups: Groups, max_bytes: int | None) -> int:
        share = None if max_bytes is None else max_bytes // len(self.models)
        return sum(self.model_of(key).put([(key, samples)], share) for key, samples in groups)

    @rule(groups=GROUPS, max_bytes=st.none() | BOUNDS)
    def put_many(self, groups: Groups, max_bytes: int | None) -> None:
        evicted = self.put_into_models(groups, max_bytes)
        assert self.store.put_many(iter(groups), max_bytes) == evicted

    @rule(rows=ROWS)
    def get_many(self, rows: list[tuple[bytes, int]]) -> None:
        found = self.store.get_many([row[0] for row in rows], [row[1] for row in rows])
        assert found == [self.model_of(row[0]).get(*row) for row in rows]

    @rule(rows=ROWS, data=st.data())
    def drop_many(self, rows: list[tuple[bytes, int]], data: st.DataObject) -> None:
        """Of each row what is there, or something else."""
        entries = []
        for key, sample_id in rows:
            there = self.model_of(key).groups.get(key, {}).get(sample_id)
            either = ENTRIES if there is None else st.just(there) | ENTRIES
            entries.append(data.draw(either))
        dropped = sum(
            [
                self.model_of(row[0]).drop(*row, entry)
                for row, entry in zip(rows, entries, strict=True)
            ]
        )
        keys, sample_ids = [row[0] for row in rows], [row[1] for row in rows]
        assert self.store.drop_many(keys, sample_ids, entries) == dropped

    @rule(max_bytes=BOUNDS)
    def evict(self, max_bytes: int) -> None:
        share = max_bytes // len(self.models)
        assert self.store.evict(max_bytes) == sum(model.evict(share) for model in self.models)

    @rule(groups=GROUPS, max_bytes=st.none() | BOUNDS)
    def replace_all(self, groups: Groups, max_bytes: int | None) -> None:
        self.models = [Model() for _ in self.models]
        evicted = self.put_into_models(groups, max_bytes)
        assert self.store.replace_all(iter(groups), max_bytes) == evicted

    @rule(groups=GROUPS)
    def replace_all_fails(self, groups: Groups) -> None:
        def failing() -> Iterator[tuple[bytes, dict[int, Entry]]]:
            yield from groups
            raise OSError("no more")

        with pytest.raises(OSError, match="no more"):
            self.store.replace_all(failing())

    @invariant()
    def content_and_order_of_use_agree(self) -> None:
        content = content_of(self.store)
        for model in self.models:
            mine = [(key, samples) for key, samples in content if self.model_of(key) is model]
            assert mine == list(model.groups.items())
        check_integrity(self.store)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*STORE_KINDS, "3 parts"])
def test_a_store_does_what_its_model_does(kind: str) -> None:
    machine = type("Machine", (StoreMachine,), {"kind": kind})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=80, stateful_step_count=25, deadline=None)
    )
