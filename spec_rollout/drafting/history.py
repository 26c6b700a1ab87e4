"""The drafter of one rollout call, whose history is given at its start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.drafting.drafter import TABLE_BYTES, Drafter, MatchShares
from spec_rollout.drafting.groups import split_large_groups
from spec_rollout.drafting.noise import NoiseLaw
from spec_rollout.types import History

# What a request is expected to generate.
_REQUEST_TOKENS = 256
_NO_BOUND = 2**62


class HistoryDrafter(Drafter):
    """A `Drafter` for the requests of one rollout call: all have joined, none leaves.

    Requests are numbered from 0. The call's history is not bounded; the n-gram table is as large as
    it asks for.

    Args:
        history: Earlier rollouts, and the group of each request.
        stop_token_ids: These are never proposed, and nothing after them is.
        shares: How many proposals passed so far. An engine gives its own to the drafter of every
            call. None starts from nothing.
        noise: That requests are drawn with.
    """

    def __init__(
        self,
        history: History,
        stop_token_ids: Sequence[int] = (),
        shares: MatchShares | None = None,
        noise: NoiseLaw = NoiseLaw.PHILOX,
    ) -> None:
        row_groups, request_groups = split_large_groups(history.row_groups, history.request_groups)
        self._num_requests = request_groups.numel()
        self._native = _C.HistoryDrafter(
            max_bytes=_NO_BOUND,
            max_group_bytes=_NO_BOUND,
            table_tokens=history.token_ids.numel() + _REQUEST_TOKENS * self._num_requests,
            max_table_bytes=TABLE_BYTES,
            is_lasting=False,
            shares=MatchShares() if shares is None else shares,
        )
        if noise is not NoiseLaw.PHILOX:
            self._native.expect_noise(noise)
        self._native.join(_numbered(request_groups), list(stop_token_ids), None)
        self._native.add_history(
            history.token_ids,
            history.logprobs,
            history.cu_lens,
            _numbered(row_groups),
            None,
            num_threads(),
        )

    @property
    def followed_lens(self) -> np.ndarray:
        """Tokens for which each request followed its draft; 0 without one. [num_requests],
        int64."""
        return np.array([self.followed_len(i) for i in range(self._num_requests)], np.int64)


def _numbered(groups: torch.Tensor) -> torch.Tensor:
    """Keys of numbered groups. [count] -> [count, 2], int64."""
    return torch.stack([groups, torch.zeros_like(groups)], dim=1)
