"""The rollout cache: what is kept, under which key, and what is a usable draft."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout._native import num_threads
from spec_rollout.cache import file
from spec_rollout.cache.arrays import PackedRollouts, sound_drafts
from spec_rollout.cache.entry import Entry, is_sound, owned
from spec_rollout.cache.memory import MemoryStore
from spec_rollout.cache.parted import PartedStore
from spec_rollout.cache.store import Groups, Store
from spec_rollout.cache.writer import Staging, Writer
from spec_rollout.checks import integer, items, of_kind, sample_indices, shown, tensors, whole
from spec_rollout.types import Drafts, Rollouts

# Of an entry, for `RolloutCache.fingerprint`: sample id, checksum.
_NAMED_CHECKSUM = struct.Struct("<qq")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache holds and what happened to it since it was created.

    `hits` and `misses` count looked-up rows, `evictions` groups dropped for space, `corrupt`
    entries dropped because their checksum was wrong. `num_bytes` includes an estimate of CPython's
    own memory per entry.
    """

    hits: int
    misses: int
    evictions: int
    corrupt: int
    num_groups: int
    num_samples: int
    num_bytes: int


class RolloutCache:
    """The latest rollout of every (prompt, sample), to be the next epoch's draft.

    A group holds the samples of one prompt, each the last response stored under its sample id. A
    cached response stays a valid draft under any later policy, so nothing is ever invalidated.
    Order, batch composition and the number of samples per prompt may change from call to call;
    samples that are not stored again stay.

    Memory is bounded by whole groups: when `max_bytes` is passed, the groups looked up or stored
    least recently go. A group that does not fit by itself is dropped (counted as an eviction) and
    the others stay. Data is usually visited once per epoch, so a bound below one epoch's rollouts
    evicts most drafts just before they are wanted.

    Every method may be called from any thread.

    Args:
        max_bytes: Bound on `stats.num_bytes`; None is no bound.
        keep_logprobs: False drops the engine's log-probs, for rules that read no draft log-probs
            (`Coupled`, `OneHot`).
        keep_behaviour: Keep who drew each token and when (`Rollouts.behaviour_logprobs`, `ages`);
            None does so where log-probs are kept. A token takes 4 bytes, 4 more with log-probs;
            with behaviour 6 more in a rollout of which something was reused, and 4 more in others
            if log-probs are not kept.
        store: What holds the rollouts; None is a `MemoryStore`. What it holds already is cached
            from the start. Caches that share a store share rollouts and bytes, not counters.
        writer: Stores off the caller's thread, in the order of the calls; None stores at once.
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        *,
        keep_logprobs: bool = True,
        keep_behaviour: bool | None = None,
        store: Store | None = None,
        writer: Writer | None = None,
    ) -> None:
        if max_bytes is not None and whole("max_bytes", max_bytes) < 0:
            raise ValueError(f"max_bytes: expected >= 0 or None (no bound), got {max_bytes}")
        self.max_bytes = max_bytes
        self.keep_logprobs = keep_logprobs
        self.keep_behaviour = keep_logprobs if keep_behaviour is None else keep_behaviour
        self._store: Store = MemoryStore() if store is None else store
        self._writer = writer
        self._staging = Staging()
        # Prompts that may be waiting to be written: the number of the last `store` of each.
        self._unwritten: dict[bytes, int] = {}
        self._num_stores = 0
        self._lock = threading.Lock()  # of the counters and of these
        self._hits = self._misses = self._evictions = self._corrupt = 0
        if store is not None and max_bytes is not None:
            self._evictions = store.evict(max_bytes)

    @property
    def is_shared(self) -> bool:
        """Whether the processes of a job find each other's rollouts here, on whatever machine."""
        return isinstance(self._store, PartedStore)

    @property
    def stats(self) -> CacheStats:
        """A snapshot."""
        self.flush()
        size = self._store.size()
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                corrupt=self._corrupt,
                num_groups=size.num_groups,
                num_samples=size.num_samples,
                num_bytes=size.num_bytes,
            )

    def lookup(
        self,
        prompt_keys: Sequence[bytes],
        sample_ids: Sequence[int] | np.ndarray | torch.Tensor,
        *,
        max_tokens: int,
        trainer_logprobs: bool = False,
    ) -> Drafts:
        """The drafts of a batch.

        Args:
            prompt_keys: `spec_rollout.keys.prompt_key` of each row. Length batch.
            sample_ids: Index of the rollout within its prompt's group. [batch], integer.
            max_tokens: Drafts longer than this are cut to it; a cut draft is not `finished`.
            trainer_logprobs: Return the log-probs the trainer computed instead of the engine's.

        Returns:
            Drafts with a row per (key, sample id); what is not cached, or fails its checksum, is an
            empty row. `logprobs` is None if any non-empty row lacks them. A token is one epoch
            older than when it was stored.

        Raises:
            ValueError: naming the argument.
        """
        ids = _check_rows(prompt_keys, sample_ids)
        if integer("max_tokens", max_tokens) < 1:
            raise ValueError(f"max_tokens: expected >= 1, got {max_tokens}")
        self._wait_for(prompt_keys)
        with self._store.borrow_many(prompt_keys, ids) as entries:
            drafts, wrong = sound_drafts(
                prompt_keys, ids, entries, max_tokens, trainer_logprobs=trainer_logprobs
            )
            corrupt = [
                (prompt_keys[row], ids[row], owned(entry))
                for row in wrong
                for entry in [entries[row]]
                if entry is not None
            ]
            num_misses = entries.count(None) + len(corrupt)
            self._count(hits=len(entries) - num_misses, misses=num_misses)
        self._drop_corrupt(corrupt)
        return drafts

    def store(
        self,
        prompt_keys: Sequence[bytes],
        sample_ids: Sequence[int] | np.ndarray | torch.Tensor,
        rollouts: Rollouts,
        trainer_logprobs: torch.Tensor | None = None,
    ) -> None:
        """Copies a batch of rollouts in, each replacing the one under its (key, sample id).

        Rollouts that were aborted or have no tokens are left out; what was cached in their place
        stays. Of rows with the same (key, sample id) the last one counts.

        Args:
            prompt_keys: As in `lookup`.
            sample_ids: As in `lookup`.
            rollouts: Any `requires_grad` is ignored; nothing of it is referenced afterwards (with a
                writer, it is copied first).
                Without `behaviour_logprobs` or `ages` its tokens count as drawn now.
            trainer_logprobs: Of every response token, from the trainer's own forward.
                [num_response_tokens], float32.

        Raises:
            ValueError: naming the argument; nothing is stored then.
        """
        ids = _check_rows(prompt_keys, sample_ids)
        of_kind("rollouts", rollouts, Rollouts, "Rollouts")
        if rollouts.batch != len(ids):
            raise ValueError(f"rollouts: expected {len(ids)} rows, got {rollouts.batch}")
        if trainer_logprobs is not None:
            tensors(trainer_logprobs=trainer_logprobs)
        packed = PackedRollouts(
            rollouts,
            trainer_logprobs,
            keep_logprobs=self.keep_logprobs,
            keep_behaviour=self.keep_behaviour,
        )
        keys = list(prompt_keys)
        if self._writer is None:
            self._put(packed.groups(keys, ids, num_threads=num_threads()))
            return
        self._writer.wait_for_room(packed.num_bytes)
        buffers = packed.copied(self._staging)

        def job() -> None:
            try:
                # On this thread alone: the others are the trainer's.
                self._put(packed.groups(keys, ids, num_threads=1))
            finally:
                self._staging.release(buffers)

        self._writer.submit(job, packed.num_bytes)
        # Only now: what a flush finds here it has waited for.
        with self._lock:
            self._num_stores += 1
            self._unwritten.update(dict.fromkeys(keys, self._num_stores))

    def _put(self, groups: Groups) -> None:
        self._count(evictions=self._store.put_many(groups, self.max_bytes))

    def flush(self) -> None:
        """Waits until everything is stored. So do all methods but `store`, `lookup` where it must.

        Raises:
            StoreError: or whatever else storing failed with; every call raises it from then on.
        """
        if self._writer is not None:
            last = self._num_stores  # others may store meanwhile
            self._writer.flush()
            self._forget_written(last)

    def _wait_for(self, prompt_keys: Sequence[bytes]) -> None:
        """Until a lookup finds what it would find if everything were stored by now.

        That is at once, if none of these prompts is waiting to be stored and no other can be
        evicted by one that is.
        """
        if self._writer is None:
            return
        last = self._num_stores
        if self._writer.idle():
            self._forget_written(last)
            return
        with self._lock:
            may_change = not self._unwritten.keys().isdisjoint(prompt_keys)
        if may_change or self.max_bytes is not None:
            self.flush()

    def _forget_written(self, last: int) -> None:
        """The writer has done all jobs up to those of the `last` call of `store`.

        While a store holds back what it was given, its prompts are still to be waited for: they are
        written by a job that is yet to come.
        """
        if self._writer is None or self._writer.holds_back or not self._unwritten:
            return
        with self._lock:
            self._unwritten = {key: n for key, n in self._unwritten.items() if n > last}

    def save(self, path: str | os.PathLike[str], *, pass_index: int | None = None) -> None:
        """Writes the whole cache to one file, which appears complete or not at all.

        An entry that fails its checksum is dropped and counted instead of saved.

        Args:
            path: A link is followed.
            pass_index: 0-based number of the pass that the rollouts are of, for `load` to say.

        Raises:
            ValueError: if `pass_index` is none.
            OSError: if the file cannot be written; a file already at `path` is then as it was.
        """
        if pass_index is not None and integer("pass_index", pass_index) < 0:
            raise ValueError(f"pass_index: expected >= 0 or None (not known), got {pass_index}")
        self.flush()
        corrupt: list[tuple[bytes, int, Entry]] = []

        def sound_groups() -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
            for key, samples in self._store.iterate():
                sound = {}
                for sample_id, entry in samples.items():
                    if is_sound(key, sample_id, entry):
                        sound[sample_id] = entry
                    else:
                        corrupt.append((key, sample_id, entry))
                if sound:
                    yield key, sound

        try:
            file.write(path, sound_groups(), pass_index)
        finally:
            self._drop_corrupt(corrupt)

    def load(self, path: str | os.PathLike[str]) -> int | None:
        """Replaces the content by that of a saved file; the counters go on.

        If the file holds more than `max_bytes`, what was used least recently before saving is
        evicted.

        Returns:
            The `pass_index` that it was saved with; None if with none, or by a version of this
            package before there was one.

        Raises:
            ValueError: if the file is truncated, not a cache, of another version or damaged, naming
                the path, what was expected and the byte offset. File and cache are then as they
                were.
            OSError: if the file cannot be read.
        """
        groups, pass_index = file.read(path)
        self.flush()
        self._count(evictions=self._store.replace_all(groups.items(), self.max_bytes))
        return pass_index

    def fingerprint(self) -> int:
        """A number that says what is cached: other rollouts have another one, whatever the order.

        A session that begins with rollouts of another one takes it as its `noise_offset`. It is
        made of the checksums of all entries, so a store that is not in memory is read as a whole.

        Returns:
            0 to 2**62 - 1; 0 if nothing is cached.
        """
        self.flush()
        total = 0
        for key, samples in self._store.iterate():
            for sample_id, entry in samples.items():
                name = key + _NAMED_CHECKSUM.pack(sample_id, entry.checksum)
                total += int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        return total % 2**62

    def _drop_corrupt(self, corrupt: list[tuple[bytes, int, Entry]]) -> None:
        if corrupt:
            self._count(corrupt=self._store.drop_many(*zip(*corrupt, strict=True)))

    def _count(
        self, *, hits: int = 0, misses: int = 0, evictions: int = 0, corrupt: int = 0
    ) -> None:
        with self._lock:
            self._hits += hits
            self._misses += misses
            self._evictions += evictions
            self._corrupt += corrupt


def _check_rows(
    prompt_keys: Sequence[bytes], sample_ids: Sequence[int] | np.ndarray | torch.Tensor
) -> list[int]:
    prompt_keys = items("prompt_keys", prompt_keys)
    ids = sample_indices(sample_ids, len(prompt_keys), "prompt key")
    for row, key in enumerate(prompt_keys):
        if not isinstance(key, bytes) or not key:
            raise ValueError(f"prompt_keys: expected non-empty bytes, row {row} is {shown(key)}")
    rows: list[int] = ids.tolist()
    return rows
