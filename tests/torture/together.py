"""Several processes with one store, and clocks that disagree."""

from __future__ import annotations

import random
import time
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

from children import Child, run
from faults import (
    NUM_KEYS,
    Outcome,
    Say,
    num_lost,
    num_wrong,
    problem_of,
    samples_of,
    steps_found,
    store_step,
)

from spec_rollout.cache import DiskStore, StoreError, disk_env
from spec_rollout.runs.lock import RunInUseError, RunLock


def two_writers(folder: Path, times: int) -> Outcome:
    """Two processes store into one store at once, each rollouts of its own."""
    outcome = Outcome("two processes on one store")

    def work(say: Say, which: int) -> None:
        with DiskStore(folder) as store:
            for step in range(times):
                key = bytes([which]) + step.to_bytes(4, "little")
                store.put_many([(key, samples_of(key, step))])

    children = [Child(lambda say, which=which: work(say, which)) for which in (1, 2)]
    ends = [child.end() for child in children]

    def check(say: Say) -> None:
        with DiskStore(folder, create=False) as store:
            there = dict(store.iterate())
            keys = [(bytes([w]) + s.to_bytes(4, "little"), s) for w in (1, 2) for s in range(times)]
            say(sum(dict(there.get(key, {})) != samples_of(key, step) for key, step in keys))

    ended = run(check)
    for end in ends:
        outcome.count(end, 0)
    outcome.lost = ended.said[0] if ended.said else 2 * times
    return outcome


def readers_while_compacting(folder: Path, times: int) -> Outcome:
    """A process opens, reads and closes the store while another compacts it whenever it may.

    It goes on until the store was compacted meanwhile: on a busy machine that takes longer.
    """
    outcome, last = Outcome("readers while it is compacted"), 20
    num_compacted = RawValue("Q", 0)  # children are forks, and share it

    def read(say: Say) -> None:
        wanted = num_compacted.value + 2  # what is at work now may have read the store before
        for number in range(times + 500):
            if number >= times and num_compacted.value >= wanted:
                return
            with DiskStore(folder, create=False) as store:
                say(num_lost(steps_found(store), last))
        raise AssertionError("it was never compacted meanwhile")

    def compact(say: Say) -> None:
        while True:
            try:
                disk_env.compact(folder)
                num_compacted.value += 1
            except StoreError as error:
                if "in use" not in str(error):
                    raise
            time.sleep(0.001)

    def fill(say: Say) -> None:
        with DiskStore(folder) as store:
            for step in range(last + 1):
                store_step(store, step)

    assert not run(fill).error
    compacting, reading = Child(compact), Child(read)
    ended = reading.end()
    compacting.kill()
    other = compacting.end()
    problems = {
        "reader": problem_of(ended),
        "compaction": problem_of(other, killed=True),
    }
    outcome.tried = max(times, len(ended.said))
    outcome.survived = 0 if any(problems.values()) else len(ended.said)
    outcome.lost = sum(ended.said)
    outcome.notes = tuple(f"{name}: {text}" for name, text in problems.items() if text)
    return outcome


def two_runs(folder: Path, times: int, seed: int = 0) -> Outcome:
    """Two training runs want one store: one has it, the other is refused, until the first is killed.

    The lock is that of `train.run_store`, which takes it before it changes anything.
    """
    outcome, rng = Outcome("two runs on one store"), random.Random(seed)
    next_step = 0
    for _ in range(times):
        start = next_step

        def work(say: Say, start: int = start) -> None:
            with DiskStore(folder) as store:
                lock = RunLock(folder, "rollout.cache_folder")
                say("mine")
                for step in range(start, start + 10_000):
                    store_step(store, step)
                    say(step)
                lock.release()

        first = Child(work)
        first.wait_for_word()
        refused = run(work)
        time.sleep(rng.random() * 0.01)
        first.kill()
        killed = first.end()
        last = max([start - 1, *killed.said[1:]])

        def check(say: Say, last: int = last) -> None:
            with DiskStore(folder, create=False) as store:
                lock = RunLock(folder, "rollout.cache_folder")
                found = steps_found(store)
                say(max([last, *found.values()]))
                say(num_lost(found, last))
                lock.release()

        ended = run(check)
        newest, lost = ended.said if len(ended.said) == 2 else (last, NUM_KEYS)
        lost += 0 if refused.said == [] and RunInUseError.__name__ in refused.error else 1
        outcome.count(ended, lost, killed)
        next_step = newest + 1
    return outcome


def clocks_that_jump(folder: Path, times: int, seed: int = 0) -> Outcome:
    """Every reading of a clock is anything between 1970 and 2096, backwards, too."""
    outcome = Outcome("clocks that jump")

    def work(say: Say, place: Path, rng: random.Random) -> None:
        for name in ("time", "monotonic"):
            setattr(time, name, lambda: rng.uniform(0.0, 4e9))
        with DiskStore(place) as store:
            marked = rng.randrange(12)
            for step in range(12):
                store_step(store, step)
                if step == marked:
                    mark = store.mark()
            say(num_wrong(steps_found(store), 11))
            store.roll_back(mark)
            say(num_wrong(steps_found(store), marked))
        with DiskStore(place, create=False) as store:
            say(num_wrong(steps_found(store), marked))

    for number in range(times):
        rng = random.Random(seed + number)
        ended = run(lambda say, p=folder / str(number), rng=rng: work(say, p, rng))
        outcome.count(ended, sum(ended.said) if len(ended.said) == 3 else NUM_KEYS)
    return outcome
