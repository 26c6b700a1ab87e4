"""Plain definitions of what the compiled core does for the cache, which tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spec_rollout.cache.entry import Entry, describe
from spec_rollout.origins import aged
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, FinishReason


def crc32c(data: bytes, crc: int = 0) -> int:
    """CRC-32C (RFC 3720, appendix B.4), bit by bit.

    Args:
        crc: Of the bytes before, 0 if there are none.
    """
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def checksum_of(prompt_key: bytes, sample_id: int, entry: Entry) -> int:
    """`entry.checksum_of`."""
    return crc32c(prompt_key + describe(sample_id, entry) + b"".join(entry.arrays))


def drafts_of(entries: Sequence[Entry | None], max_tokens: int, trainer_logprobs: bool) -> Drafts:
    """Sound entries as packed drafts, each cut to `max_tokens`: `arrays.sound_drafts`."""
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


def join_known(arrays: Sequence[bytes | None], max_tokens: int) -> torch.Tensor | None:
    """`join` of float32; None if an array is missing."""
    known = [array for array in arrays if array is not None]
    return join(known, max_tokens, np.float32) if len(known) == len(arrays) else None


def join(arrays: Sequence[bytes], max_tokens: int, dtype: type[np.generic]) -> torch.Tensor:
    """Packs arrays of `dtype`, each cut to `max_tokens`, with one copy per row."""
    width = np.dtype(dtype).itemsize
    limit = width * max_tokens
    sizes = [min(len(array), limit) for array in arrays]
    packed = np.empty(sum(sizes) // width, dtype=dtype)
    view, end = packed.view(np.uint8).data, 0
    for array, size in zip(arrays, sizes, strict=True):
        start, end = end, end + size
        view[start:end] = array if len(array) == size else memoryview(array)[:size]
    return torch.from_numpy(packed)
