"""What faults are tried on, and how what comes of them is counted.

A store of known rollouts, which says of itself what is missing or wrong; an `Outcome` per fault.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from children import Ended

from spec_rollout.cache import DiskStore
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

    def count(self, ended: Ended | None, lost: int, killed: Ended | None = None) -> None:
        """Counts a try.

        Args:
            ended: How the process ended that looked at what is there afterwards; None if none did.
            killed: How the one ended that was sent SIGKILL.
        """
        self.tried += 1
        problem = "" if ended is None else problem_of(ended)
        if killed is not None and not problem:
            problem = problem_of(killed, killed=True)
        self.survived += not problem
        self.lost += lost
        if (problem or lost) and len(self.notes) < 5:
            self.notes += (f"try {self.tried}: {lost} lost" + (problem and f", {problem}"),)

    def line(self) -> str:
        """One line of the summary."""
        text = f"{self.fault:34} tried {self.tried:4}  survived {self.survived:4}  lost {self.lost}"
        return "\n    ".join([text, *self.notes])


def problem_of(ended: Ended, *, killed: bool = False) -> str:
    """Why a process did not end as it should have; empty if it did.

    Args:
        killed: Whether it was sent SIGKILL. It may have ended before that, but by no other signal:
            what crashes by itself has not survived.
    """
    if ended.error:
        return ended.error.strip().splitlines()[-1]
    expected = (None, signal.SIGKILL) if killed else (None,)
    return "" if ended.signal in expected else f"signal {ended.signal}"


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
