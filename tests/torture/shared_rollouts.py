"""Faults of the folder in which engines share rollouts."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path

import numpy as np
from children import Child, run
from faults import Outcome, Say, key_of

from spec_rollout.drafting import HistoryFolder, HistoryIdentity, KeptRows

IDENTITY = HistoryIdentity("toy", "kind", 1 << 20, "")


def rows_of(writer: int, number: int) -> KeptRows:
    """The rollout that a writer finishes as its `number`-th."""
    tokens = np.array([writer, number, *([number % 7] * (100 + 37 * (number % 50)))], np.int32)
    logprobs = np.full(tokens.size, -0.5, np.float32)
    return KeptRows.of([(key_of(writer), [(number, tokens.tobytes(), logprobs.tobytes())])])


def opened(folder: Path) -> HistoryFolder:
    return HistoryFolder(folder, IDENTITY, 1 << 26)


def numbers(folder: HistoryFolder) -> dict[int, list[int]]:
    """Of all rollouts of others, by writer.

    Raises:
        AssertionError: if one is not as it was written.
    """
    found: dict[int, list[int]] = {}
    while received := folder.read():
        for rows in received:
            for begin, end in zip(rows.cu_lens[:-1], rows.cu_lens[1:], strict=True):
                writer, number = rows.token_ids[begin : begin + 2].tolist()
                expected = rows_of(writer, number).token_ids
                assert np.array_equal(rows.token_ids[begin:end], expected), "not what was written"
                found.setdefault(writer, []).append(number)
    return found


def kill_while_sharing(folder: Path, times: int, seed: int = 0) -> Outcome:
    """SIGKILL at random moments of a writer. Others read what it wrote, and go on."""
    outcome, rng = Outcome("kill -9 while sharing"), random.Random(seed)
    reader = opened(folder)
    for writer in range(times):

        def work(say: Say, writer: int = writer) -> None:
            own = opened(folder)
            for number in range(100_000):
                own.append(rows_of(writer % 250, number))
                say(number)

        child = Child(work)
        child.wait_for_word()
        time.sleep(rng.random() * 0.02)
        child.kill()
        killed = child.end()
        last = max([-1, *killed.said])

        def check(say: Say, writer: int = writer, last: int = last) -> None:
            found = numbers(reader)
            assert set(found) == {writer % 250}, "what had been read came again"
            assert reader.num_damaged == 0
            # The rollout after the last one that it spoke of may be there, too.
            say(len(set(range(last + 1)) - set(found[writer % 250])))

        ended = run(check)
        outcome.count(ended, ended.said[0] if ended.said else last + 1, killed)
        numbers(reader)
    return outcome


def full_folder(folder: Path, times: int, seed: int = 0) -> Outcome:
    """No file may grow beyond a random size. What was there stays, and it goes on with room."""
    outcome, rng = Outcome("full disk while sharing"), random.Random(seed)
    for writer in range(times):
        room = rng.randrange(1_000, 300_000)
        reader = opened(folder)
        numbers(reader)

        def work(say: Say, writer: int = writer, room: int = room) -> None:
            own = opened(folder)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            failed = 0
            for number in range(2000):
                try:
                    own.append(rows_of(writer, number))
                    say(number)
                except OSError:
                    failed += 1
                    if failed == 3:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                if failed == 3 and number % 50 == 0:
                    return
            raise AssertionError("the disk was never full")

        ended = run(work)
        found = numbers(reader).get(writer, [])
        assert reader.num_damaged == 0
        outcome.count(ended, len(set(ended.said) ^ set(found)))
    return outcome


def two_sharing(folder: Path, times: int) -> Outcome:
    """Two processes write and read at once; each ends up with all that the other wrote."""
    outcome = Outcome("two processes share")

    def work(say: Say, which: int) -> None:
        own, found = opened(folder), set()
        for number in range(times):
            own.append(rows_of(which, number))
            found |= set(numbers(own).get(3 - which, []))
        for _ in range(1000):
            if len(found) == times:
                break
            time.sleep(0.01)
            found |= set(numbers(own).get(3 - which, []))
        say(times - len(found) + own.num_damaged)

    children = [Child(lambda say, which=which: work(say, which)) for which in (1, 2)]
    for child in children:
        ended = child.end()
        outcome.count(ended, ended.said[0] if ended.said else times)
    return outcome
