"""Responses as they come in, and their packing into `Rollouts`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch

from spec_rollout.engines.transformers.requests import Plan
from spec_rollout.origins import with_origins
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import FinishReason, RolloutRequests, Rollouts, RolloutStats


@dataclass(slots=True)
class Response:
    """One request's response: the accepted prefix of its draft, then what was sampled.

    Attributes:
        accepted_len: Draft tokens kept.
        token_ids: Sampled tokens, piece by piece.
        logprobs: Of accepted and sampled tokens, piece by piece.
    """

    accepted_len: int = 0
    token_ids: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)


class Results:
    """Responses of a batch, filled in any order."""

    def __init__(self, plan: Plan, stop_token_ids: Collection[int]) -> None:
        self._plan = plan
        self._stop = frozenset(stop_token_ids)
        self.responses = [Response() for _ in range(plan.batch)]

    def is_last(self, request: int, position: int, token_id: int) -> bool:
        """Whether the response ends with this token at this response position."""
        return token_id in self._stop or position + 1 >= self._plan.rooms[request]

    def pack(self, requests: RolloutRequests, policy_version: int, stats: RolloutStats) -> Rollouts:
        """All responses in request order; fills the counts of `stats` that they determine."""
        plan = self._plan
        pieces, logprobs, lens, accepted_lens = [], [], [], []
        for request, response in enumerate(self.responses):
            pieces.append(plan.draft_ids(request)[: response.accepted_len])
            pieces.extend(response.token_ids)
            logprobs.extend(response.logprobs)
            accepted_lens.append(response.accepted_len)
            lens.append(response.accepted_len + sum(piece.size for piece in response.token_ids))
        empty = np.empty(0)
        response_ids = np.concatenate(pieces or [empty]).astype(np.int32)
        cu_response_lens = cu_lens_from(torch.tensor(lens, dtype=torch.int64))
        last_ids = response_ids[cu_response_lens[1:].numpy() - 1]
        stopped = np.isin(last_ids, list(self._stop))
        accepted = np.asarray(accepted_lens, dtype=np.int32)
        stats.num_rollouts = plan.batch
        stats.num_drafts = int(plan.has_draft.sum())
        stats.num_draft_tokens = int(plan.draft_lens.sum())
        stats.num_reused_tokens = int(accepted.sum())
        stats.num_fully_reused = int((plan.draft_ends & (accepted == plan.draft_lens)).sum())
        stats.num_response_tokens = response_ids.size
        stats.num_generated_tokens = response_ids.size - stats.num_reused_tokens
        rollouts = Rollouts(
            prompt_ids=requests.prompt_ids,
            cu_prompt_lens=requests.cu_prompt_lens,
            response_ids=torch.from_numpy(response_ids),
            cu_response_lens=cu_response_lens,
            logprobs=torch.from_numpy(np.concatenate(logprobs or [empty]).astype(np.float32)),
            accepted_lens=torch.from_numpy(accepted),
            finish_reasons=torch.from_numpy(
                np.where(stopped, FinishReason.STOP, FinishReason.LENGTH).astype(np.uint8)
            ),
            policy_version=policy_version,
            stats=stats,
        )
        return with_origins(rollouts, requests.drafts)
