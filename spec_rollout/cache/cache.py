"""The rollout cache: what is kept, under which key, and what is a usable draft."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout.cache import file
from spec_rollout.cache.arrays import (
    Origins,
    ages_of,
    behaviour_of,
    join,
    join_known,
    view_bytes,
)
from spec_rollout.cache.entry import Entry, is_sound, make_entry
from spec_rollout.cache.memory import MemoryStore
from spec_rollout.cache.store import Store
from spec_rollout.checks import as_array, integer, items, of_kind, shown, tensors, whole
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, FinishReason, Rollouts


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
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        *,
        keep_logprobs: bool = True,
        keep_behaviour: bool | None = None,
        store: Store | None = None,
    ) -> None:
        if max_bytes is not None and whole("max_bytes", max_bytes) < 0:
            raise ValueError(f"max_bytes: expected >= 0 or None (no bound), got {max_bytes}")
        self.max_bytes = max_bytes
        self.keep_logprobs = keep_logprobs
        self.keep_behaviour = keep_logprobs if keep_behaviour is None else keep_behaviour
        self._store: Store = MemoryStore() if store is None else store
        self._lock = threading.Lock()  # of the counters
        self._hits = self._misses = self._evictions = self._corrupt = 0
        if store is not None and max_bytes is not None:
            self._evictions = store.evict(max_bytes)

    @property
    def stats(self) -> CacheStats:
        """A snapshot."""
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
        entries = self._sound_entries(prompt_keys, ids)
        lens = torch.zeros(len(entries), dtype=torch.int64)
        finished = torch.zeros(len(entries), dtype=torch.bool)
        rows = [row for row, entry in enumerate(entries) if entry is not None]
        found = [entry for entry in entries if entry is not None]
        if rows:
            full_lens = torch.tensor([len(entry.token_ids) // 4 for entry in found])
            reasons = torch.tensor([entry.finish_reason for entry in found])
            lens[rows] = full_lens.clamp(max=max_tokens)
            finished[rows] = (reasons == FinishReason.STOP) & (full_lens <= max_tokens)
        kept = [entry.trainer_logprobs if trainer_logprobs else entry.logprobs for entry in found]
        return Drafts(
            token_ids=join([entry.token_ids for entry in found], max_tokens, np.int32),
            cu_lens=cu_lens_from(lens),
            logprobs=join_known(kept, max_tokens),
            finished=finished,
            behaviour_logprobs=behaviour_of(found, max_tokens, trainer_logprobs),
            ages=ages_of(found, max_tokens),
        )

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
            rollouts: Any `requires_grad` is ignored; nothing of it is referenced afterwards.
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
        token_bytes = view_bytes("rollouts.response_ids", rollouts.response_ids, torch.int32)
        num_tokens = len(token_bytes) // 4
        logprob_bytes = trainer_bytes = None
        if self.keep_logprobs:
            logprob_bytes = view_bytes(
                "rollouts.logprobs", rollouts.logprobs, torch.float32, num_tokens
            )
        if trainer_logprobs is not None:
            tensors(trainer_logprobs=trainer_logprobs)
            trainer_bytes = view_bytes(
                "trainer_logprobs", trainer_logprobs, torch.float32, num_tokens
            )

        origins = Origins(rollouts, self.keep_behaviour, num_tokens)
        cu = rollouts.cu_response_lens.tolist()
        reasons = rollouts.finish_reasons.tolist()
        rows_of: dict[bytes, list[int]] = {}
        for row, key in enumerate(prompt_keys):
            if cu[row + 1] > cu[row] and reasons[row] != FinishReason.ABORT:
                rows_of.setdefault(key, []).append(row)

        def entry(key: bytes, row: int) -> Entry:
            span = slice(4 * cu[row], 4 * cu[row + 1])
            return make_entry(
                key,
                ids[row],
                token_ids=bytes(token_bytes[span]),
                logprobs=bytes(logprob_bytes[span]) if logprob_bytes else None,
                trainer_logprobs=bytes(trainer_bytes[span]) if trainer_bytes else None,
                finish_reason=reasons[row],
                policy_version=rollouts.policy_version,
                **origins.of(row, cu[row], cu[row + 1], has_logprobs=logprob_bytes is not None),
            )

        # Made as the store asks for them: what a group replaces goes before the next one is made.
        groups = (
            (key, {ids[row]: entry(key, row) for row in rows}) for key, rows in rows_of.items()
        )
        self._count(evictions=self._store.put_many(groups, self.max_bytes))

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
        self._count(evictions=self._store.replace_all(groups.items(), self.max_bytes))
        return pass_index

    def _sound_entries(self, prompt_keys: Sequence[bytes], ids: list[int]) -> list[Entry | None]:
        """What is cached for each row; what fails its checksum is dropped and None."""
        entries = self._store.get_many(prompt_keys, ids)
        corrupt: list[tuple[bytes, int, Entry]] = []
        for row, (key, sample_id, entry) in enumerate(zip(prompt_keys, ids, entries, strict=True)):
            if entry is not None and not is_sound(key, sample_id, entry):
                corrupt.append((key, sample_id, entry))
                entries[row] = None
        self._drop_corrupt(corrupt)
        num_misses = entries.count(None)
        self._count(hits=len(entries) - num_misses, misses=num_misses)
        return entries

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
    ids = as_array("sample_ids", sample_ids)
    if ids.shape != (len(prompt_keys),) or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"sample_ids: expected {len(prompt_keys)} integers, one per prompt key, "
            f"got {ids.dtype} of shape {list(ids.shape)}"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= 2**63):
        raise ValueError(f"sample_ids: expected 0 <= value < 2**63, got {ids.min()} to {ids.max()}")
    for row, key in enumerate(prompt_keys):
        if not isinstance(key, bytes) or not key:
            raise ValueError(f"prompt_keys: expected non-empty bytes, row {row} is {shown(key)}")
    rows: list[int] = ids.tolist()
    return rows
