"""Rollouts to put into caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, FinishReason, Rollouts


def make_rollouts(
    responses: Sequence[Sequence[int]],
    *,
    logprobs: Sequence[Sequence[float]] | None = None,
    finish_reasons: Sequence[int] | None = None,
    policy_version: int = 0,
) -> Rollouts:
    """Rollouts with these responses; unless given, log-probs are -(token id) / 8 and all have
    stopped."""
    batch = len(responses)
    if logprobs is None:
        logprobs = [[-token / 8 for token in response] for response in responses]
    if finish_reasons is None:
        finish_reasons = [FinishReason.STOP] * batch
    return Rollouts(
        prompt_ids=torch.ones(batch, dtype=torch.int32),
        cu_prompt_lens=torch.arange(batch + 1),
        response_ids=torch.tensor([t for r in responses for t in r], dtype=torch.int32),
        cu_response_lens=cu_lens_from(torch.tensor([len(r) for r in responses])),
        logprobs=torch.tensor([v for row in logprobs for v in row], dtype=torch.float32),
        accepted_lens=torch.zeros(batch, dtype=torch.int32),
        finish_reasons=torch.tensor([int(f) for f in finish_reasons], dtype=torch.uint8),
        policy_version=policy_version,
    )


def rows_of(drafts: Drafts) -> list[list[int]]:
    """Token ids of each row."""
    return [row.tolist() for row in drafts.token_ids.split(drafts.lens.tolist())]


def logprob_rows_of(drafts: Drafts) -> list[list[float]]:
    """Log-probs of each row."""
    assert drafts.logprobs is not None
    return [row.tolist() for row in drafts.logprobs.split(drafts.lens.tolist())]
