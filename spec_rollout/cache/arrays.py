"""Between packed tensors and the bytes of entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spec_rollout.cache.entry import Entry
from spec_rollout.origins import aged
from spec_rollout.types import Rollouts


class Origins:
    """Behaviour log-probs and ages of rollouts as bytes, where they say more than log-probs do."""

    def __init__(self, rollouts: Rollouts, keep: bool, num_tokens: int) -> None:
        self._reused: list[int] = rollouts.accepted_lens.tolist()
        self._ages = self._behaviour = None
        behaviour = rollouts.logprobs
        if rollouts.behaviour_logprobs is not None:
            behaviour = rollouts.behaviour_logprobs
        if keep:
            self._behaviour = view_bytes(
                "rollouts.behaviour_logprobs", behaviour, torch.float32, num_tokens
            )
            if rollouts.ages is not None:
                self._ages = view_bytes("rollouts.ages", rollouts.ages, torch.int16, num_tokens)

    def of(self, row: int, start: int, end: int, *, has_logprobs: bool) -> dict[str, bytes]:
        """The arrays of a row that are not those of a rollout of which nothing was reused."""
        arrays: dict[str, bytes] = {}
        reused = self._reused[row] > 0
        if self._behaviour is not None and (reused or not has_logprobs):
            arrays["behaviour_logprobs"] = bytes(self._behaviour[4 * start : 4 * end])
        if self._ages is not None and reused:
            arrays["ages"] = bytes(self._ages[2 * start : 2 * end])
        return arrays


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
