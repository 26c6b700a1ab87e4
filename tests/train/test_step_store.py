"""Rollouts of a step appear when it is done, and not at all if it is not."""

from __future__ import annotations

import pytest
from test_batching import make_rollouts

from spec_rollout.cache import MemoryStore, RolloutCache
from spec_rollout.keys import prompt_key
from spec_rollout.train.step_store import StepStore

KEYS = [prompt_key([1, 2]), prompt_key([3])]


def lens(cache: RolloutCache) -> list[int]:
    return cache.lookup(KEYS, [0, 0], max_tokens=99).lens.tolist()


@pytest.mark.parametrize("kept", [True, False])
def test_what_waits_is_not_there_yet(kept: bool) -> None:
    store = StepStore(MemoryStore())
    cache = RolloutCache(store=store)
    cache.store(KEYS, [0, 0], make_rollouts([2, 1], [4, 6]))
    assert lens(cache) == [0, 0]
    store.keep()
    assert lens(cache) == [4, 6]
    cache.store(KEYS[:1], [0], make_rollouts([2], [9]))
    cache.store(KEYS[1:], [0], make_rollouts([1], [7]))
    assert lens(cache) == [4, 6]
    if kept:
        store.keep()
    else:
        store.drop()
    assert lens(cache) == ([9, 7] if kept else [4, 6])
    store.keep()  # nothing waits any more
    assert lens(cache) == ([9, 7] if kept else [4, 6])
    assert cache.stats.num_groups == 2


def test_the_bound_holds_when_it_is_kept() -> None:
    store = StepStore(MemoryStore())
    cache = RolloutCache(store=store)
    cache.store(KEYS, [0, 0], make_rollouts([2, 1], [4, 6]))
    store.keep()
    bound = cache.stats.num_bytes - 1
    bounded = RolloutCache(bound, store=store)  # evicts what is one too many
    assert lens(bounded) == [0, 6]
    bounded.store(KEYS[:1], [0], make_rollouts([2], [4]))
    assert lens(bounded) == [0, 6]
    store.keep()
    assert lens(bounded) == [4, 0]
    assert bounded.stats.num_bytes <= bound
