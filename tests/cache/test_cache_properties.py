"""The cache, on every store, against a model of it: an ordered dict with the documented rules
written out plainly."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path

import pytest
from cache_samples import STORE_KINDS, logprob_rows_of, make_rollouts, open_store, rows_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from spec_rollout.cache import RolloutCache
from spec_rollout.cache.entry import ENTRY_OVERHEAD_BYTES, GROUP_OVERHEAD_BYTES
from spec_rollout.types import FinishReason

KEYS = st.sampled_from([bytes([k]) * 16 for k in range(5)])
SAMPLE_IDS = st.integers(0, 3)
RESPONSES = st.lists(st.integers(0, 2**31 - 1), max_size=60)
REASONS = st.sampled_from(list(FinishReason))

Model = OrderedDict[bytes, dict[int, tuple[list[int], FinishReason]]]


def _group_bytes(samples: dict[int, tuple[list[int], FinishReason]]) -> int:
    return GROUP_OVERHEAD_BYTES + sum(
        ENTRY_OVERHEAD_BYTES + 8 * len(response) for response, _ in samples.values()
    )


class CacheMachine(RuleBasedStateMachine):
    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.open = ExitStack()

    def teardown(self) -> None:
        self.open.close()

    def _new_cache(self, max_bytes: int | None) -> RolloutCache:
        folder = Path(self.open.enter_context(tempfile.TemporaryDirectory()))
        store = self.open.enter_context(open_store(self.kind, folder))
        return RolloutCache(max_bytes, store=store)

    @initialize(max_bytes=st.none() | st.integers(0, 6000))
    def start(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.cache = self._new_cache(max_bytes)
        self.model: Model = OrderedDict()
        self.evictions = self.hits = self.misses = 0

    def _evict(self) -> None:
        if self.max_bytes is None:
            return
        while sum(map(_group_bytes, self.model.values())) > self.max_bytes:
            newest = next(reversed(self.model))
            if _group_bytes(self.model[newest]) > self.max_bytes:
                del self.model[newest]
            else:
                self.model.popitem(last=False)
            self.evictions += 1

    @rule(rows=st.lists(st.tuples(KEYS, SAMPLE_IDS, RESPONSES, REASONS), max_size=8))
    def store(self, rows: list[tuple[bytes, int, list[int], FinishReason]]) -> None:
        rollouts = make_rollouts([row[2] for row in rows], finish_reasons=[row[3] for row in rows])
        self.cache.store([row[0] for row in rows], [row[1] for row in rows], rollouts)
        kept = [row for row in rows if row[2] and row[3] != FinishReason.ABORT]
        for key in dict.fromkeys(row[0] for row in kept):
            group = self.model.setdefault(key, {})
            group.update({row[1]: (row[2], row[3]) for row in kept if row[0] == key})
            self.model.move_to_end(key)
            self._evict()

    @rule(rows=st.lists(st.tuples(KEYS, SAMPLE_IDS), max_size=8), max_tokens=st.integers(1, 70))
    def lookup(self, rows: list[tuple[bytes, int]], max_tokens: int) -> None:
        keys, sample_ids = [row[0] for row in rows], [row[1] for row in rows]
        drafts = self.cache.lookup(keys, sample_ids, max_tokens=max_tokens)
        expected, finished = [], []
        for key, sample_id in rows:
            found = self.model.get(key, {}).get(sample_id)
            if key in self.model:
                self.model.move_to_end(key)
            self.hits += found is not None
            self.misses += found is None
            response, reason = found or ([], FinishReason.LENGTH)
            expected.append(response[:max_tokens])
            finished.append(reason == FinishReason.STOP and len(response) <= max_tokens)
        assert rows_of(drafts) == expected
        assert drafts.finished.tolist() == finished
        logprobs = make_rollouts(expected).logprobs.split([len(row) for row in expected])
        assert logprob_rows_of(drafts) == [row.tolist() for row in logprobs]

    @rule(max_bytes=st.none() | st.integers(0, 6000))
    def save_and_load(self, max_bytes: int | None) -> None:
        """Into another cache, which may have another bound; the test goes on with that one."""
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "cache")
            self.cache = self._new_cache(max_bytes)
            self.cache.load(Path(folder) / "cache")
        self.max_bytes = max_bytes
        self.evictions = self.hits = self.misses = 0
        loaded, self.model = self.model, OrderedDict()
        for key, samples in loaded.items():
            self.model[key] = samples
            self._evict()

    @invariant()
    def the_counts_agree(self) -> None:
        stats = self.cache.stats
        assert stats.num_groups == len(self.model)
        assert stats.num_samples == sum(map(len, self.model.values()))
        assert stats.num_bytes == sum(map(_group_bytes, self.model.values()))
        assert (stats.hits, stats.misses, stats.evictions) == (
            self.hits,
            self.misses,
            self.evictions,
        )
        assert stats.corrupt == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORE_KINDS)
def test_a_cache_does_what_its_model_does(kind: str) -> None:
    machine = type("Machine", (CacheMachine,), {"kind": kind})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None)
    )
