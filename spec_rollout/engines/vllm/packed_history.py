"""The bytes of a history, for the way from the caller's process to the workers."""

from __future__ import annotations

import numpy as np
import torch

from spec_rollout.types import History

# token_ids int32, cu_lens int64, row_groups int64, request_groups int64, log-probs float32 (none:
# empty), little-endian
PackedHistory = tuple[bytes, bytes, bytes, bytes, bytes]


def pack_history(history: History) -> PackedHistory:
    """The bytes of a history."""
    logprobs = history.logprobs
    return (
        history.token_ids.numpy().astype("<i4", copy=False).tobytes(),
        history.cu_lens.numpy().astype("<i8", copy=False).tobytes(),
        history.row_groups.numpy().astype("<i8", copy=False).tobytes(),
        history.request_groups.numpy().astype("<i8", copy=False).tobytes(),
        b"" if logprobs is None else logprobs.numpy().astype("<f4", copy=False).tobytes(),
    )


def unpack_history(packed: PackedHistory) -> History:
    """Inverse of `pack_history`."""
    token_ids, cu_lens, row_groups, request_groups, logprobs = (
        # A copy: torch wants to own what it gets.
        torch.from_numpy(np.frombuffer(data, dtype).astype(dtype[1:]))
        for data, dtype in zip(packed, ("<i4", "<i8", "<i8", "<i8", "<f4"), strict=True)
    )
    return History(
        token_ids,
        cu_lens,
        row_groups,
        request_groups,
        logprobs if logprobs.shape == token_ids.shape else None,
    )
