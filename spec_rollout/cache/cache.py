"""The rollout cache, in memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from spec_rollout.cache import file
from spec_rollout.cache.entry import GROUP_OVERHEAD_BYTES, Entry, checksum_of, make_entry
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


@dataclass(slots=True)
class _Group:
    samples: dict[int, Entry] = field(default_factory=dict)
    num_bytes: int = 0

    def put(self, sample_id: int, entry: Entry) -> None:
        self.drop(sample_id)
        self.samples[sample_id] = entry
        self.num_bytes += entry.num_bytes

    def drop(self, sample_id: int) -> None:
        entry = self.samples.pop(sample_id, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes


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
        keep_logprobs: False drops the engine's log-probs and halves the memory, for rules that read
            no draft log-probs (`Coupled`, `OneHot`).
    """

    def __init__(self, max_bytes: int | None = None, *, keep_logprobs: bool = True) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes: expected >= 0 or None (no bound), got {max_bytes}")
        self.max_bytes = max_bytes
        self.keep_logprobs = keep_logprobs
        self._lock = threading.Lock()
        self._groups: OrderedDict[bytes, _Group] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._hits = self._misses = self._evictions = self._corrupt = 0

    @property
    def stats(self) -> CacheStats:
        """A snapshot."""
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                corrupt=self._corrupt,
                num_groups=len(self._groups),
                num_samples=sum(len(group.samples) for group in self._groups.values()),
                num_bytes=self._num_bytes,
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
            empty row. `logprobs` is None if any non-empty row lacks them.

        Raises:
            ValueError: naming the argument.
        """
        ids = _check_rows(prompt_keys, sample_ids)
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected >= 1, got {max_tokens}")
        with self._lock:
            entries = [
                self._find(key, sample) for key, sample in zip(prompt_keys, ids, strict=True)
            ]
            num_hits = sum(entry is not None for entry in entries)
            self._hits += num_hits
            self._misses += len(entries) - num_hits

        lens = torch.zeros(len(entries), dtype=torch.int64)
        finished = torch.zeros(len(entries), dtype=torch.bool)
        rows = [row for row, entry in enumerate(entries) if entry is not None]
        found = [entry for entry in entries if entry is not None]
        if rows:
            full_lens = torch.tensor([entry.num_tokens for entry in found])
            stopped = torch.tensor([entry.finish_reason == FinishReason.STOP for entry in found])
            lens[rows] = full_lens.clamp(max=max_tokens)
            finished[rows] = stopped & (full_lens <= max_tokens)
        kept = [entry.trainer_logprobs if trainer_logprobs else entry.logprobs for entry in found]
        known = [array for array in kept if array is not None]
        return Drafts(
            token_ids=_join([entry.token_ids for entry in found], max_tokens, np.int32),
            cu_lens=cu_lens_from(lens),
            logprobs=_join(known, max_tokens, np.float32) if len(known) == len(found) else None,
            finished=finished,
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
            trainer_logprobs: Of every response token, from the trainer's own forward.
                [num_response_tokens], float32.

        Raises:
            ValueError: naming the argument; nothing is stored then.
        """
        ids = _check_rows(prompt_keys, sample_ids)
        if rollouts.batch != len(ids):
            raise ValueError(f"rollouts: expected {len(ids)} rows, got {rollouts.batch}")
        token_bytes = _view_bytes("rollouts.response_ids", rollouts.response_ids, torch.int32)
        num_tokens = len(token_bytes) // 4
        logprob_bytes = trainer_bytes = None
        if self.keep_logprobs:
            logprob_bytes = _view_bytes(
                "rollouts.logprobs", rollouts.logprobs, torch.float32, num_tokens
            )
        if trainer_logprobs is not None:
            trainer_bytes = _view_bytes(
                "trainer_logprobs", trainer_logprobs, torch.float32, num_tokens
            )

        cu = rollouts.cu_response_lens.tolist()
        reasons = rollouts.finish_reasons.tolist()
        rows_of: dict[bytes, list[int]] = {}
        for row, key in enumerate(prompt_keys):
            if cu[row + 1] > cu[row] and reasons[row] != FinishReason.ABORT:
                rows_of.setdefault(key, []).append(row)

        with self._lock:
            for key, rows in rows_of.items():
                group = self._take(key) or _Group(num_bytes=GROUP_OVERHEAD_BYTES)
                for row in rows:
                    span = slice(4 * cu[row], 4 * cu[row + 1])
                    entry = make_entry(
                        key,
                        ids[row],
                        token_ids=bytes(token_bytes[span]),
                        logprobs=bytes(logprob_bytes[span]) if logprob_bytes else None,
                        trainer_logprobs=bytes(trainer_bytes[span]) if trainer_bytes else None,
                        finish_reason=reasons[row],
                        policy_version=rollouts.policy_version,
                    )
                    group.put(ids[row], entry)
                self._insert(key, group)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole cache to one file, which appears complete or not at all.

        An entry that fails its checksum is dropped and counted instead of saved.

        Raises:
            OSError: if the file cannot be written; a file already at `path` is then as it was.
        """
        with self._lock:
            for key, group in list(self._groups.items()):
                for sample_id in list(group.samples):
                    self._verified(key, sample_id)
            groups = {key: dict(group.samples) for key, group in self._groups.items()}
        file.write(path, groups)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces the content by that of a saved file; the counters go on.

        If the file holds more than `max_bytes`, what was used least recently before saving is
        evicted.

        Raises:
            ValueError: if the file is truncated, not a cache, of another version or damaged, naming
                the path, what was expected and the byte offset. File and cache are then as they
                were.
            OSError: if the file cannot be read.
        """
        loaded = file.read(path)
        with self._lock:
            self._groups.clear()
            self._num_bytes = 0
            for key, samples in loaded.items():
                group = _Group(num_bytes=GROUP_OVERHEAD_BYTES)
                for sample_id, entry in samples.items():
                    group.put(sample_id, entry)
                self._insert(key, group)

    # The methods below expect the lock to be held.

    def _find(self, key: bytes, sample_id: int) -> Entry | None:
        group = self._groups.get(key)
        if group is None:
            return None
        self._groups.move_to_end(key)
        return self._verified(key, sample_id)

    def _verified(self, key: bytes, sample_id: int) -> Entry | None:
        """The entry; None if there is none or it is corrupt, in which case it is dropped."""
        group = self._groups[key]
        entry = group.samples.get(sample_id)
        if entry is None or checksum_of(key, sample_id, entry) == entry.checksum:
            return entry
        self._corrupt += 1
        self._take(key)
        group.drop(sample_id)
        if group.samples:
            self._insert(key, group)
        return None

    def _take(self, key: bytes) -> _Group | None:
        group = self._groups.pop(key, None)
        if group is not None:
            self._num_bytes -= group.num_bytes
        return group

    def _insert(self, key: bytes, group: _Group) -> None:
        """Makes `group` the most recently used and restores the bound."""
        if self.max_bytes is not None and group.num_bytes > self.max_bytes:
            self._evictions += 1
            return
        self._groups[key] = group
        self._num_bytes += group.num_bytes
        while self.max_bytes is not None and self._num_bytes > self.max_bytes:
            self._take(next(iter(self._groups)))
            self._evictions += 1


def _check_rows(
    prompt_keys: Sequence[bytes], sample_ids: Sequence[int] | np.ndarray | torch.Tensor
) -> list[int]:
    ids = np.asarray(sample_ids)
    if ids.shape != (len(prompt_keys),) or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"sample_ids: expected {len(prompt_keys)} integers, one per prompt key, "
            f"got {ids.dtype} of shape {list(ids.shape)}"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= 2**63):
        raise ValueError(f"sample_ids: expected 0 <= value < 2**63, got {ids.min()} to {ids.max()}")
    for row, key in enumerate(prompt_keys):
        if not isinstance(key, bytes) or not key:
            raise ValueError(f"prompt_keys: expected non-empty bytes, row {row} is {key!r}")
    rows: list[int] = ids.tolist()
    return rows


def _view_bytes(
    name: str, values: torch.Tensor, dtype: torch.dtype, num_tokens: int | None = None
) -> memoryview:
    """A 1-D tensor as bytes, without a copy if it is contiguous."""
    expected = "[num_response_tokens]" if num_tokens is None else f"[{num_tokens}]"
    wrong_size = num_tokens is not None and values.numel() != num_tokens
    if values.dim() != 1 or values.dtype != dtype or wrong_size:
        raise ValueError(
            f"{name}: expected {dtype} of shape {expected}, "
            f"got {values.dtype} of shape {list(values.shape)}"
        )
    return values.detach().cpu().contiguous().numpy().view(np.uint8).data


def _join(arrays: Sequence[bytes], max_tokens: int, dtype: type[np.generic]) -> torch.Tensor:
    """Packs arrays of 4-byte values, each cut to `max_tokens`, with one copy per row."""
    limit = 4 * max_tokens
    # NumPy asks for huge pages: at 50 MB twice as fast as filling a bytearray or a torch.empty.
    packed = np.empty(sum(min(len(array), limit) for array in arrays) // 4, dtype=dtype)
    view, end = packed.view(np.uint8).data, 0
    for array in arrays:
        start, end = end, end + min(len(array), limit)
        view[start:end] = array if len(array) <= limit else memoryview(array)[:limit]
    return torch.from_numpy(packed)
