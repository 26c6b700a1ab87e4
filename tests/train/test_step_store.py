"""Rollouts of a step appear when it is done, and not at all if it is not."""

from __future__ import annotations

import threading

import pytest
from test_batching import make_rollouts

from spec_rollout.cache import MemoryStore, RolloutCache
from spec_rollout.cache.writer import Writer
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


class Gate(MemoryStore):
    """A store whose puts wait for `open`."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.num_puts = 0

    def put_many(self, groups, max_bytes=None):
        assert self.open.wait(30)
        self.num_puts += 1
        return super().put_many(groups, max_bytes)


def test_a_step_of_several_calls_is_waited_for_and_kept_at_once() -> None:
    """Between the calls the writer is idle, and yet nothing is stored."""
    inner, writer = Gate(), Writer()
    store = StepStore(inner, writer)
    cache = RolloutCache(store=store, writer=writer)
    cache.store(KEYS[:1], [0], make_rollouts([2], [4]))
    writer.flush()
    assert lens(cache) == [0, 0]
    cache.store(KEYS[1:], [0], make_rollouts([1], [6]))
    store.keep()
    assert not writer.idle()
    threading.Timer(0.2, inner.open.set).start()
    assert cache.lookup(KEYS[:1], [0], max_tokens=99).lens.tolist() == [4]
    assert lens(cache) == [4, 6]
    assert inner.num_puts == 1
    writer.close()
