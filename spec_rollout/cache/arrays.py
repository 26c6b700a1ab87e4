"""Between packed tensors and the bytes of entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spec_rollout.cache.entry import Entry, make_entry
from spec_rollout.cache.writer import Staging
from spec_rollout.origins import aged
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, FinishReason, Rollouts


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
        self._cu: list[int] = rollouts.cu_response_lens.tolist()
        self._reasons: list[int] = rollouts.finish_reasons.tolist()
        self._reused: list[int] = rollouts.accepted_lens.tolist()
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

    def usable(self, row: int) -> bool:
        """Whether a row is a draft for later: it has tokens, and was not aborted."""
        return self._cu[row + 1] > self._cu[row] and self._reasons[row] != FinishReason.ABORT

    def entry(self, key: bytes, sample_id: int, row: int) -> Entry:
        """The entry of a row."""
        start, end = self._cu[row], self._cu[row + 1]
        reused = self._reused[row] > 0
        arrays: dict[str, bytes] = {}
        for name, view in self._views.items():
            # Of a rollout of which nothing was reused these say nothing new.
            if (name == "ages" and not reused) or (
                name == "behaviour_logprobs" and not reused and "logprobs" in self._views
            ):
                continue
            width = 2 if name == "ages" else 4
            arrays[name] = bytes(view[width * start : width * end])
        return make_entry(
            key,
            sample_id,
            token_ids=arrays["token_ids"],
            logprobs=arrays.get("logprobs"),
            trainer_logprobs=arrays.get("trainer_logprobs"),
            finish_reason=self._reasons[row],
            policy_version=self._policy_version,
            behaviour_logprobs=arrays.get("behaviour_logprobs"),
            ages=arrays.get("ages"),
        )


def drafts_of(entries: Sequence[Entry | None], max_tokens: int, trainer_logprobs: bool) -> Drafts:
    """Entries as packed drafts, each cut to `max_tokens`; see `RolloutCache.lookup`."""
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


def behaviour_of(
    found: Sequence[Entry], max_tokens: int, beside_others: bool
) -> torch.Tensor | None:
    """Behaviour log-probs of entries; None if they are their `logprobs`, or not known.

    Args:
        beside_others: The drafts' log-probs are not the entries' `logprobs`.
    """
    if not beside_others and all(entry.behaviour_logprobs is None for entry in found):
        return None
    return join_known(
        [entry.logprobs if e is None else e for entry in found for e in [entry.behaviour_logprobs]],
        max_tokens,
    )


def ages_of(found: Sequence[Entry], max_tokens: int) -> torch.Tensor | None:
    """Ages of entries, one epoch later; None if all are 1."""
    if all(entry.ages is None for entry in found):
        return None
    arrays = [bytes(len(e.token_ids) // 2) if e.ages is None else e.ages for e in found]
    return aged(join(arrays, max_tokens, np.int16))


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


def join_known(arrays: Sequence[bytes | None], max_tokens: int) -> torch.Tensor | None:
    """`join` of float32; None if an array is missing."""
    known = [array for array in arrays if array is not None]
    return join(known, max_tokens, np.float32) if len(known) == len(arrays) else None


def join(arrays: Sequence[bytes], max_tokens: int, dtype: type[np.generic]) -> torch.Tensor:
    """Packs arrays of `dtype`, each cut to `max_tokens`, with one copy per row."""
    width = np.dtype(dtype).itemsize
    limit = width * max_tokens
    sizes = [min(len(array), limit) for array in arrays]
    # NumPy asks for huge pages: at 50 MB twice as fast as filling a bytearray or a torch.empty.
    packed = np.empty(sum(sizes) // width, dtype=dtype)
    view, end = packed.view(np.uint8).data, 0
    for array, size in zip(arrays, sizes, strict=True):
        start, end = end, end + size
        view[start:end] = array if len(array) == size else memoryview(array)[:size]
    return torch.from_numpy(packed)
