"""Where the tokens of rollouts come from: who drew them, how long ago, and what is new.

Reused tokens are scored anew, so their `logprobs` say nothing about the policy that drew them. What
does is carried along here, from drafts to rollouts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from spec_rollout.types import Drafts, Rollouts

# Ages are int16; what is older stays at this.
MAX_AGE = 32767
# A log ratio beyond this says "never"; its exponential would drown all others.
_MAX_LOG_RATIO = 20.0


def with_origins(rollouts: Rollouts, drafts: Drafts) -> Rollouts:
    """Fills `behaviour_logprobs` and `ages`.

    Args:
        rollouts: With accepted lengths.
        drafts: Row by row those that were verified; may be longer than what was verified of them.

    Returns:
        The same rollouts. `behaviour_logprobs` is None if a reused token's is not known.
    """
    ages = torch.zeros(rollouts.response_ids.numel(), dtype=torch.int16)
    reused = list(_reused(rollouts, drafts))
    if not reused:
        return replace(rollouts, behaviour_logprobs=rollouts.logprobs, ages=ages)
    _copy(ages, drafts.ages, reused, absent=1)
    known = drafts.logprobs if drafts.behaviour_logprobs is None else drafts.behaviour_logprobs
    behaviour = None
    if known is not None:
        behaviour = rollouts.logprobs.clone()
        _copy(behaviour, known, reused)
    return replace(rollouts, behaviour_logprobs=behaviour, ages=ages)


def _reused(rollouts: Rollouts, drafts: Drafts) -> Iterator[tuple[slice, slice]]:
    """Where the accepted prefix of a row is, in the responses and in the drafts."""
    rows = rollouts.accepted_lens.nonzero().flatten()
    for start, draft_start, num_tokens in zip(
        rollouts.cu_response_lens[rows].tolist(),
        drafts.cu_lens[rows].tolist(),
        rollouts.accepted_lens[rows].tolist(),
        strict=True,
    ):
        yield slice(start, start + num_tokens), slice(draft_start, draft_start + num_tokens)


def _copy(
    to: torch.Tensor,
    source: torch.Tensor | None,
    spans: Sequence[tuple[slice, slice]],
    absent: int = 0,
) -> None:
    """Copies spans, row by row: less work than an index per token."""
    out = to.numpy()
    values = None if source is None else source.numpy()
    for there, here in spans:
        out[there] = absent if values is None else values[here]


def aged(ages: torch.Tensor) -> torch.Tensor:
    """One epoch older. [n], int16 -> [n], int16."""
    return torch.where(ages < MAX_AGE, ages + 1, ages)


def kl_sum(rollouts: Rollouts) -> float:
    """Sum over all tokens of the k3 estimate of KL(behaviour || current), nats.

    r - 1 - ln r with r = p_current / p_behaviour, never negative; a fresh token has 0. Log ratios
    are cut to +-20. 0 if `behaviour_logprobs` is not known.
    """
    if rollouts.behaviour_logprobs is None:
        return 0.0
    log_ratio = rollouts.logprobs - rollouts.behaviour_logprobs
    # Of a token that neither policy would draw the difference is NaN.
    log_ratio = log_ratio.masked_fill_(rollouts.logprobs == rollouts.behaviour_logprobs, 0.0)
    log_ratio = log_ratio.clamp_(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return float((torch.expm1(log_ratio) - log_ratio).sum(dtype=torch.float64))


def taken_lens(
    drafts: Drafts,
    sample_ids: np.ndarray,
    epoch: int,
    *,
    fresh_share: float = 0.0,
    max_age: int | None = None,
) -> torch.Tensor:
    """Lengths of the drafts that are reused; 0 of the others.

    Args:
        drafts: Of all rows.
        sample_ids: Index of each row within its prompt's group. [batch], int64.
        epoch: 0-based; with it the samples take turns, so that each is fresh in `fresh_share` of
            the epochs.
        fresh_share: Share of each group that is drawn from scratch.
        max_age: Drafts whose first token, which is the oldest, is older are left alone. From
            `MAX_AGE` on it leaves none alone, as no age is larger.

    Returns:
        [batch], int64.
    """
    lens = drafts.lens.clone()
    turn = sample_ids + epoch
    # Where a line of this slope passes a whole number: evenly spread, `fresh_share` of all.
    fresh = np.floor((turn + 1) * fresh_share) > np.floor(turn * fresh_share)
    lens[torch.from_numpy(fresh)] = 0
    if max_age is not None and drafts.ages is not None:
        rows = (lens > 0).nonzero().flatten()
        lens[rows[drafts.ages[drafts.cu_lens[rows]] > min(max_age, MAX_AGE)]] = 0
    return lens


class ResponseCounts(NamedTuple):
    """Responses of a call, each prompt's for itself."""

    num_groups: int
    num_distinct: int
    num_new: int


def count_responses(
    groups: Sequence[Hashable], rollouts: Rollouts, cached: Drafts
) -> ResponseCounts:
    """Counts prompts, their different responses, and those of them that were not cached.

    Args:
        groups: Identity of each row's prompt. Length batch.
        rollouts: What came out.
        cached: What was cached for each row before.
    """
    responses: dict[Hashable, set[int]] = {}
    for group, digest in zip(
        groups, _digests(rollouts.response_ids, rollouts.cu_response_lens), strict=True
    ):
        responses.setdefault(group, set()).add(digest)
    known: dict[Hashable, set[int]] = {}
    if cached.token_ids.numel():
        for group, digest in zip(groups, _digests(cached.token_ids, cached.cu_lens), strict=True):
            known.setdefault(group, set()).add(digest)
    return ResponseCounts(
        num_groups=len(responses),
        num_distinct=sum(map(len, responses.values())),
        num_new=sum(len(own - known.get(group, set())) for group, own in responses.items()),
    )


def _digests(token_ids: torch.Tensor, cu_lens: torch.Tensor) -> Iterator[int]:
    """A hash of each row's tokens."""
    data = token_ids.contiguous().numpy().view(np.uint8).data
    for start, end in pairwise(cu_lens.tolist()):
        yield hash(bytes(data[4 * start : 4 * end]))
