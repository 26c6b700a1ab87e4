"""A store's process killed at any moment."""

from __future__ import annotations

import random
import time
from pathlib import Path

from children import Child, run
from faults import NUM_KEYS, Outcome, Say, key_of, keys_of, num_lost, steps_found, store_step

from spec_rollout.cache import DiskStore, disk_env


def kill_while_storing(folder: Path, times: int, seed: int = 0) -> Outcome:
    """SIGKILL at random moments of puts, lookups, marks and the letting go of marks."""
    outcome, rng = Outcome("kill -9 while storing"), random.Random(seed)
    next_step = 0
    for _ in range(times):
        start = next_step

        def work(say: Say, start: int = start) -> None:
            with DiskStore(folder) as store:
                for step in range(start, start + 10_000):
                    store_step(store, step)
                    say(step)
                    store.get_many([key_of(k) for k in keys_of(step + 7)], [0] * (NUM_KEYS // 3))
                    if step % 3 == 0:
                        store.mark()
                    if step % 5 == 0:
                        store.keep_marks(store.marks()[-2:])

        child = Child(work)
        child.wait_for_word()
        time.sleep(rng.random() * 0.03)
        child.kill()
        killed = child.end()
        last = max([start - 1, *killed.said])

        def check(say: Say) -> None:
            with DiskStore(folder, create=False) as store:
                say({str(key): step for key, step in steps_found(store).items()})

        ended = run(check)
        found = {int(k): step for k, step in ended.said[0].items()} if ended.said else {}
        outcome.count(ended, num_lost(found, last), killed)
        next_step = max([last, *found.values()]) + 1
    return outcome


def kill_while_compacting(folder: Path, times: int, seed: int = 0) -> Outcome:
    """SIGKILL at random moments of compactions."""
    outcome, rng = Outcome("kill -9 while compacting"), random.Random(seed)
    last = 40

    def fill(say: Say) -> None:
        with DiskStore(folder) as store:
            for step in range(last + 1):
                store_step(store, step)

    assert not run(fill).error
    for _ in range(times):

        def work(say: Say) -> None:
            for _ in range(1000):
                disk_env.compact(folder)
                say("once")

        child = Child(work)
        if rng.random() < 0.5:
            child.wait_for_word()
        time.sleep(rng.random() * 0.02)
        child.kill()
        killed = child.end()

        def check(say: Say) -> None:
            with DiskStore(folder, create=False) as store:
                say(num_lost(steps_found(store), last))

        ended = run(check)
        outcome.count(ended, ended.said[0] if ended.said else NUM_KEYS, killed)
    return outcome
