"""Faults on purpose: each is tried a number of times, and what came of it is counted."""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import Child, Ended, run

from spec_rollout.cache import DiskStore, StoreError, disk_env
from spec_rollout.cache.entry import Entry, is_sound, make_entry
from spec_rollout.types import FinishReason

Say = Callable[[Any], None]
NUM_KEYS, NUM_SAMPLES = 24, 3


@dataclass
class Outcome:
    """What came of a fault.

    Attributes:
        tried: How often it was made.
        survived: How often the store went on afterwards, or refused clearly what was damaged.
        lost: Rollouts that were stored and gone, or wrong, although the fault had not destroyed
            them.
        notes: What went wrong, if anything did.
    """

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    notes: tuple[str, ...] = ()

    def count(self, ended: Ended, lost: int) -> None:
        self.tried += 1
        bad = ended.signal is not None or ended.error
        self.survived += not bad
        self.lost += lost
        if (bad or lost) and len(self.notes) < 5:
            last = ended.error.strip().splitlines()[-1] if ended.error else f"signal {ended.signal}"
            self.notes += (f"try {self.tried}: {lost} lost, {last}",)

    def line(self) -> str:
        """One line of the summary."""
        text = f"{self.fault:34} tried {self.tried:4}  survived {self.survived:4}  lost {self.lost}"
        return "\n    ".join([text, *self.notes])


def key_of(number: int) -> bytes:
    return bytes([number]) * 16


def samples_of(key: bytes, step: int) -> dict[int, Entry]:
    """What step `step` stores under a key; its first token is the step."""
    tokens = [step, *([key[0]] * (40 + 37 * (step % 60)))]
    ids = b"".join(token.to_bytes(4, "little") for token in tokens)
    return {
        sample: make_entry(
            key, sample, token_ids=ids, logprobs=ids, trainer_logprobs=None,
            finish_reason=int(FinishReason.STOP), policy_version=step,
        )
        for sample in range(NUM_SAMPLES)
    }  # fmt: skip


def keys_of(step: int) -> list[int]:
    """A third of the keys, another one each step."""
    return random.Random(step).sample(range(NUM_KEYS), NUM_KEYS // 3)


def store_step(store: DiskStore, step: int) -> None:
    store.put_many((key_of(k), samples_of(key_of(k), step)) for k in keys_of(step))


def steps_found(store: DiskStore) -> dict[int, int]:
    """The step of each key's rollouts, all of which are as they were stored, and all there.

    Raises:
        AssertionError: if a group is not whole, a rollout wrong, or the sums are not those of what
            is there.
    """
    found: dict[int, int] = {}
    num_samples = num_bytes = 0
    for key, samples in store.iterate():
        step = int.from_bytes(samples[0].token_ids[:4], "little")
        assert dict(samples) == samples_of(key, step), f"key {key[0]} is not that of step {step}"
        assert all(is_sound(key, s, entry) for s, entry in samples.items())
        found[key[0]] = step
        num_samples += len(samples)
        num_bytes += 448 + sum(entry.num_bytes for entry in samples.values())
    assert store.size() == (len(found), num_samples, num_bytes), "the sums are wrong"
    return found


def num_lost(found: dict[int, int], last_said: int) -> int:
    """Keys whose newest rollouts are not there, after step `last_said` was said to be stored.

    The step after it may have been stored, whole, or not at all.
    """
    return min(num_wrong(found, last_said), num_wrong(found, last_said + 1))


def num_wrong(found: dict[int, int], last: int) -> int:
    """Keys whose rollouts are not those of a store whose last step was `last`."""
    expected = {k: step for step in range(last + 1) for k in keys_of(step)}
    return sum(found.get(key) != expected.get(key) for key in range(NUM_KEYS))


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
        said = child.end().said
        last = max([start - 1, *said])

        def check(say: Say) -> None:
            with DiskStore(folder, create=False) as store:
                say({str(key): step for key, step in steps_found(store).items()})

        ended = run(check)
        found = {int(k): step for k, step in ended.said[0].items()} if ended.said else {}
        outcome.count(ended, num_lost(found, last))
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
        child.end()

        def check(say: Say) -> None:
            with DiskStore(folder, create=False) as store:
                say(num_lost(steps_found(store), last))

        ended = run(check)
        outcome.count(ended, ended.said[0] if ended.said else NUM_KEYS)
    return outcome


def damage(folder: Path, times: int, seed: int = 0) -> list[Outcome]:
    """Files that were cut, have other bits, zeros in the middle, or something behind.

    Survived is a store that is refused, or one that gives back nothing but what was stored, and
    takes what is stored anew. Lost counts wrong rollouts that were given back.
    """
    whole, last = folder / "whole", 30

    def fill(say: Say) -> None:
        with DiskStore(whole) as store:
            for step in range(last + 1):
                store_step(store, step)

    assert not run(fill).error
    data = (whole / disk_env.DATA).read_bytes()
    rng = random.Random(seed)

    def cut() -> bytes:
        return data[: rng.randrange(len(data))]

    def flipped() -> bytes:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 8, 200))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    def zeroed() -> bytes:
        start, size = rng.randrange(len(data)), rng.choice((8, 512, 4096, 65536))
        return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]

    def appended() -> bytes:
        return data + rng.randbytes(rng.choice((1, 4096, 100_000)))

    outcomes = []
    for name, spoil in (
        ("truncated files", cut),
        ("flipped bits", flipped),
        ("zeroed ranges", zeroed),
        ("something appended", appended),
    ):
        outcome = Outcome(name)
        for number in range(times):
            spoiled = folder / f"{name}-{number}".replace(" ", "-")
            spoiled.mkdir()
            (spoiled / disk_env.DATA).write_bytes(spoil())
            ended = run(lambda say, spoiled=spoiled: _use_damaged(say, spoiled))
            outcome.count(ended, sum(n for n in ended.said if isinstance(n, int)))
            shutil.rmtree(spoiled)
        outcomes.append(outcome)
    shutil.rmtree(whole)
    return outcomes


def _use_damaged(say: Say, folder: Path) -> None:
    from spec_rollout.cache import RolloutCache

    keys = [key_of(k) for k in range(NUM_KEYS) for _ in range(NUM_SAMPLES)]
    ids = list(range(NUM_SAMPLES)) * NUM_KEYS
    try:
        with DiskStore(folder) as store:
            drafts = RolloutCache(store=store).lookup(keys, ids, max_tokens=10_000)
            rows = drafts.token_ids.split(drafts.lens.tolist())
            say(sum(_is_wrong(key, row.tolist()) for key, row in zip(keys, rows, strict=True)))
            store_step(store, 99)
            say(
                sum(
                    store.get_many([key_of(k)], [0])[0] != samples_of(key_of(k), 99)[0]
                    for k in keys_of(99)
                )
            )
            list(store.iterate())
    except StoreError as error:
        say(str(error))


def _is_wrong(key: bytes, tokens: list[int]) -> bool:
    if not tokens:
        return False  # a miss
    ids = samples_of(key, tokens[0])[0].token_ids
    return b"".join(t.to_bytes(4, "little", signed=True) for t in tokens) != ids


def full_disk(folder: Path, times: int, seed: int = 0) -> Outcome:
    """No file may grow beyond a random size: puts fail, what was there stays, and it goes on."""
    outcome, rng = Outcome("full disk"), random.Random(seed)
    for number in range(times):
        place = folder / f"full-{number}"
        room = rng.randrange(60_000, 900_000)

        def work(say: Say, place: Path = place, room: int = room) -> None:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            with DiskStore(place) as store:
                store_step(store, 0)
                resource.setrlimit(resource.RLIMIT_FSIZE, (store.file_bytes() + room, hard))
                last = 0
                for step in range(1, 200):
                    try:
                        store.mark()  # which keeps the room of what is replaced
                        store_step(store, step)
                    except StoreError:
                        break
                    last = step
                else:
                    raise AssertionError("the disk was never full")
                say(num_lost(steps_found(store), last))
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                store_step(store, last + 1)
                say(num_lost(steps_found(store), last + 1))
            with DiskStore(place) as store:
                say(num_lost(steps_found(store), last + 1))

        ended = run(work)
        outcome.count(ended, sum(ended.said) if len(ended.said) == 3 else NUM_KEYS)
        shutil.rmtree(place)
    return outcome


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
    """A process opens, reads and closes the store while another compacts it whenever it may."""
    outcome, last = Outcome("readers while it is compacted"), 20

    def read(say: Say) -> None:
        for _ in range(times):
            with DiskStore(folder, create=False) as store:
                say(num_lost(steps_found(store), last))

    def compact(say: Say) -> None:
        while True:
            try:
                disk_env.compact(folder)
                say("once")
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
    outcome.tried = times
    outcome.survived = len(ended.said)
    outcome.lost = sum(ended.said)
    for name, error in (("reader", ended.error), ("compaction", other.error)):
        if error:
            outcome.notes += (f"{name}: {error.strip().splitlines()[-1]}",)
    return outcome


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not os.path.islink(p))
