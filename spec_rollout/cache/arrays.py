"""Between packed tensors and the bytes of entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.cache.entry import Entry
from spec_rollout.cache.writer import Staging
from spec_rollout.origins import aged
from spec_rollout.types import Drafts, FinishReason, Rollouts

# Entries are made so many tokens at a time, some 10 MB: threads meet at the end of each time.
_TOKENS_AT_ONCE = 1 << 20
_ARRAYS = ("token_ids", "logprobs", "trainer_logprobs", "behaviour_logprobs", "ages")


class PackedRollouts:
    """The bytes of a batch of rollouts, of which entries are made.

    Args:
        rollouts, trainer_logprobs: See `RolloutCache.store`.
        keep_logprobs, keep_behaviour: See `RolloutCache`.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        trainer_logprobs: torch.Tensor | None,
        *,
        keep_logprobs: bool,
        keep_behaviour: bool,
    ) -> None:
        # Copies: nothing of the rollouts is referenced once `copied` was called.
        self._cu = np.array(rollouts.cu_response_lens.tolist(), np.int64)
        self._reasons = np.array(rollouts.finish_reasons.tolist(), np.uint8)
        self._reused = np.array(rollouts.accepted_lens.tolist(), np.int64) > 0
        self._policy_version = rollouts.policy_version
        tokens = view_bytes("rollouts.response_ids", rollouts.response_ids, torch.int32)
        size = len(tokens) // 4
        views = {"token_ids": tokens}
        if keep_logprobs:
            views["logprobs"] = view_bytes(
                "rollouts.logprobs", rollouts.logprobs, torch.float32, size
            )
        if trainer_logprobs is not None:
            views["trainer_logprobs"] = view_bytes(
                "trainer_logprobs", trainer_logprobs, torch.float32, size
            )
        if keep_behaviour:
            given = rollouts.behaviour_logprobs
            if given is not None or not keep_logprobs:
                views["behaviour_logprobs"] = view_bytes(
                    "rollouts.behaviour_logprobs",
                    rollouts.logprobs if given is None else given,
                    *(torch.float32, size),
                )
            else:
                views["behaviour_logprobs"] = views["logprobs"]
            if rollouts.ages is not None:
                views["ages"] = view_bytes("rollouts.ages", rollouts.ages, torch.int16, size)
        self._views = views

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(len(view) for view in self._views.values())

    def copied(self, staging: Staging) -> list[np.ndarray]:
        """Makes the arrays copies; gives what is to be released when they are of no more use."""
        buffers: list[np.ndarray] = []
        copies: dict[int, memoryview] = {}
        for name, view in self._views.items():
            if id(view) not in copies:  # behaviour log-probs may be the log-probs
                buffers.append(staging.copy(view))
                copies[id(view)] = buffers[-1].data[: len(view)]
            self._views[name] = copies[id(view)]
        return buffers

    def groups(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int], *, num_threads: int
    ) -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
        """The entries of all rows that are drafts for later: with tokens, and not aborted.

        Some are made at a time, as they are asked for: what they replace can go before the next
        ones are made. Of rows with the same key and sample id the last one counts.

        Args:
            prompt_keys, sample_ids: Length batch.
            num_threads: That copy.
        """
        lens = np.diff(self._cu)
        usable = (lens > 0) & (self._reasons != FinishReason.ABORT)
        rows_of: dict[bytes, list[int]] = {}
        for row in np.flatnonzero(usable).tolist():
            rows_of.setdefault(prompt_keys[row], []).append(row)
        tokens_of, num_tokens = lens.tolist(), 0
        chunk: list[tuple[bytes, list[int]]] = []
        for key, rows in rows_of.items():
            chunk.append((key, rows))
            num_tokens += sum(tokens_of[row] for row in rows)
            if num_tokens >= _TOKENS_AT_ONCE:
                yield from self._made(chunk, prompt_keys, sample_ids, num_threads)
                chunk, num_tokens = [], 0
        yield from self._made(chunk, prompt_keys, sample_ids, num_threads)

    def _made(
        self,
        chunk: Sequence[tuple[bytes, list[int]]],
        prompt_keys: Sequence[bytes],
        sample_ids: Sequence[int],
        num_threads: int,
    ) -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
        entries = iter(
            _C.pack_entries(
                *(Entry, prompt_keys, sample_ids, [row for _, rows in chunk for row in rows]),
                [self._views.get(name) for name in _ARRAYS],
                *(self._cu, self._reasons, self._reused, self._policy_version, num_threads),
            )
        )
        for key, rows in chunk:
            yield key, {sample_ids[row]: next(entries) for row in rows}


def sound_drafts(
    prompt_keys: Sequence[bytes],
    sample_ids: Sequence[int],
    entries: Sequence[Entry | None],
    max_tokens: int,
    *,
    trainer_logprobs: bool,
) -> tuple[Drafts, list[int]]:
    """Entries as packed drafts, each cut to `max_tokens`; see `RolloutCache.lookup`.

    Checksums are compared while the arrays are copied, by as many threads as torch has.

    Returns:
        The drafts, and the rows whose entry is not what was once stored there; these are empty.
    """
    rows, wrong = list(entries), list[int]()
    while True:
        batch = _C.EntryBatch(prompt_keys, sample_ids, rows)
        drafts, failed = _unpacked(batch, len(rows), max_tokens, trainer_logprobs)
        if not failed:
            return drafts, sorted(wrong)
        # Rare: all is copied again, as if these were not there.
        wrong += failed
        for row in failed:
            rows[row] = None


def _unpacked(
    batch: _C.EntryBatch, num_rows: int, max_tokens: int, trainer_logprobs: bool
) -> tuple[Drafts, list[int]]:
    cu_lens, finished = np.empty(num_rows + 1, np.int64), np.empty(num_rows, np.bool_)
    batch.layout(max_tokens, int(FinishReason.STOP), cu_lens, finished)
    counts = batch.counts()

    def room(dtype: type[np.generic], wanted: bool) -> np.ndarray | None:
        # NumPy asks for huge pages: at 50 MB twice as fast as filling a torch.empty.
        return np.empty(int(cu_lens[-1]), dtype) if wanted else None

    def known(name: str) -> bool:
        return counts[name] == counts["entries"]

    # Behaviour log-probs are not said again where they are the drafts' log-probs.
    says_more = trainer_logprobs or counts["behaviour_logprobs"] > 0
    token_ids = room(np.int32, True)
    logprobs = room(np.float32, known("trainer_logprobs" if trainer_logprobs else "logprobs"))
    behaviour = room(np.float32, says_more and known("any_logprobs"))
    ages = room(np.int16, counts["ages"] > 0)
    failed = batch.unpack(
        cu_lens, trainer_logprobs, token_ids, logprobs, behaviour, ages, num_threads()
    )

    def tensor(values: np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(values)

    drafts = Drafts(
        token_ids=torch.from_numpy(token_ids),
        cu_lens=torch.from_numpy(cu_lens),
        logprobs=tensor(logprobs),
        finished=torch.from_numpy(finished),
        behaviour_logprobs=tensor(behaviour),
        ages=None if ages is None else aged(torch.from_numpy(ages)),
    )
    return drafts, failed


def view_bytes(
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
