"""Files that are damaged, and disks that are full."""

from __future__ import annotations

import random
import resource
import shutil
from pathlib import Path

from children import run
from faults import (
    NUM_KEYS,
    NUM_SAMPLES,
    Outcome,
    Say,
    key_of,
    keys_of,
    num_lost,
    samples_of,
    steps_found,
    store_step,
)

from spec_rollout.cache import DiskStore, StoreError, disk_env


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
