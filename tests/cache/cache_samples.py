"""Rollouts to put into caches, entries to put into stores, and the stores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec_rollout.cache import MemoryStore, Store, StoreError
from spec_rollout.cache.disk import DiskStore
from spec_rollout.cache.disk_records import Group, index_key, number, number_of
from spec_rollout.cache.entry import Entry, group_bytes, make_entry
from spec_rollout.cache.part import Part
from spec_rollout.cache.parted import Call, PartedStore
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, FinishReason, Rollouts


def make_rollouts(
    responses: Sequence[Sequence[int]],
    *,
    logprobs: Sequence[Sequence[float]] | None = None,
    finish_reasons: Sequence[int] | None = None,
    policy_version: int = 0,
) -> Rollouts:
    """Rollouts with these responses; unless given, log-probs are -(token id) / 8 and all have
    stopped."""
    batch = len(responses)
    if logprobs is None:
        logprobs = [[-token / 8 for token in response] for response in responses]
    if finish_reasons is None:
        finish_reasons = [FinishReason.STOP] * batch
    return Rollouts(
        prompt_ids=torch.ones(batch, dtype=torch.int32),
        cu_prompt_lens=torch.arange(batch + 1),
        response_ids=torch.tensor([t for r in responses for t in r], dtype=torch.int32),
        cu_response_lens=cu_lens_from(torch.tensor([len(r) for r in responses])),
        logprobs=torch.tensor([v for row in logprobs for v in row], dtype=torch.float32),
        accepted_lens=torch.zeros(batch, dtype=torch.int32),
        finish_reasons=torch.tensor([int(f) for f in finish_reasons], dtype=torch.uint8),
        policy_version=policy_version,
    )


def reused(rollouts: Rollouts) -> Rollouts:
    """The same with all tokens reused: drawn 3 epochs ago with log-probs that are 1 higher."""
    return replace(
        rollouts,
        accepted_lens=rollouts.response_lens.int(),
        behaviour_logprobs=rollouts.logprobs + 1,
        ages=torch.full((rollouts.response_ids.numel(),), 3, dtype=torch.int16),
    )


def rows_of(drafts: Drafts) -> list[list[int]]:
    """Token ids of each row."""
    return [row.tolist() for row in drafts.token_ids.split(drafts.lens.tolist())]


def logprob_rows_of(drafts: Drafts) -> list[list[float]]:
    """Log-probs of each row."""
    assert drafts.logprobs is not None
    return [row.tolist() for row in drafts.logprobs.split(drafts.lens.tolist())]


class LocalParts(PartedStore):
    """Parts in this process, each asked by one thread at a time, as an actor is.

    Attributes:
        asked: The methods that each call asked for, by part.
    """

    def __init__(self, num_parts: int, open_store: Callable[[], Store] = MemoryStore) -> None:
        super().__init__(num_parts)
        self.parts = [Part(open_store) for _ in range(num_parts)]
        self.asked: list[dict[int, str]] = []
        self._locks = [threading.Lock() for _ in range(num_parts)]

    def _ask(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        self.asked.append({part: call[0] for part, call in calls.items()})
        answers: dict[int, Any] = {}
        failed: list[StoreError] = []
        for part, (method, *args) in calls.items():
            with self._locks[part]:
                try:
                    answers[part] = getattr(self.parts[part], method)(*args)
                except StoreError as error:
                    failed.append(error)
        if failed:
            raise failed[0]
        return answers

    def _tell(self, calls: Mapping[int, Call]) -> None:
        self._ask(calls)


# A further store adds its name here and itself to `open_store`.
STORE_KINDS = ("memory", "disk", "parts")


@contextmanager
def open_store(kind: str, folder: Path) -> Iterator[Store]:
    """An empty store; what it leaves on disk is in `folder`."""
    if kind == "disk":
        with DiskStore(folder / "store", sync=False) as store:
            yield store
        return
    if kind.endswith("parts"):  # a number of them, or one, which promises what every store does
        yield LocalParts(int(kind.removesuffix("parts") or 1))
        return
    if kind != "memory":
        raise ValueError(f"kind: expected one of {STORE_KINDS}, got {kind!r}")
    yield MemoryStore()


def entry_of(
    key: bytes,
    sample_id: int,
    tokens: Sequence[int],
    *,
    logprobs: bool = True,
    trainer_logprobs: bool = False,
    policy_version: int = 0,
) -> Entry:
    """A sound entry of these tokens; log-probs are -(token id) / 8, the trainer's twice that."""
    ids = np.asarray(tokens, np.int32)
    values = (-ids / 8).astype(np.float32)
    return make_entry(
        key,
        sample_id,
        token_ids=ids.tobytes(),
        logprobs=values.tobytes() if logprobs else None,
        trainer_logprobs=(2 * values).tobytes() if trainer_logprobs else None,
        finish_reason=int(FinishReason.STOP),
        policy_version=policy_version,
    )


def put(store: Store, key: bytes, *sample_ids: int, num_tokens: int = 10) -> None:
    """Puts entries of `num_tokens` tokens into one group."""
    samples = {sample: entry_of(key, sample, [1] * num_tokens) for sample in sample_ids}
    assert store.put_many([(key, samples)]) == 0


def content_of(store: Store) -> list[tuple[bytes, dict[int, Entry]]]:
    """Every group, from the least to the most recently used."""
    return [(key, dict(samples)) for key, samples in store.iterate()]


def check_integrity(store: Store) -> None:
    """What holds of every store at every moment."""
    content = content_of(store)
    assert len({key for key, _ in content}) == len(content)
    assert all(samples for _, samples in content)
    assert store.size() == (
        len(content),
        sum(len(samples) for _, samples in content),
        sum(group_bytes(samples) for _, samples in content),
    )


def check_segments(store: DiskStore) -> None:
    """Every segment that is there is named by a group or for a mark, and the other way round."""
    shared = store._shared
    with shared.reading() as txn:
        records = [value for _, value in txn.cursor(shared.groups)]
        records += [value for _, value in txn.cursor(shared.undo) if len(value)]
        named = set().union(*(Group.from_bytes(record).segments for record in records))
        assert {number_of(key) for key, _ in txn.cursor(shared.segments)} == named
        if not store.marks():
            assert txn.stat(shared.undo)["entries"] == 0


def damage_group(store: DiskStore, key: bytes, mark: int | None = None) -> None:
    """Flips a bit in a group's record: of now, or that which is kept for a mark."""
    shared = store._shared
    with shared.writing() as txn:
        if mark is None:
            place, database = index_key(key), shared.groups
        else:
            place, database = number(mark) + index_key(key), shared.undo
        record = bytearray(txn.get(place, db=database))
        record[-3] ^= 4
        txn.put(place, bytes(record), db=database)
