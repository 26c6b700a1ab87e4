"""Proposals from a prompt's other rollouts, for requests that follow no draft.

The engine sends the history of a rollout call once, ahead of its requests (`ReuseWorker.spec_rollout_begin`), and a
request says which it is by its `collect_id`. So nothing is sent twice, every worker of a tensor-parallel engine gets it,
the index is built by several threads before the first step, and it is gone when the call ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout.drafting import HistoryDrafter, MatchShares, Payoff, StepCost
from spec_rollout.engines.vllm.rows import Row
from spec_rollout.ragged import ranges
from spec_rollout.types import History

# token_ids int32, cu_lens int64, row_groups int64, request_groups int64, log-probs float32 (none: empty), little-endian
PackedHistory = tuple[bytes, bytes, bytes, bytes, bytes]


def pack_history(history: History) -> PackedHistory:
    """The bytes of a history, for the way to the workers."""
    return (
        history.token_ids.numpy().astype("<i4", copy=False).tobytes(),
        history.cu_lens.numpy().astype("<i8", copy=False).tobytes(),
        history.row_groups.numpy().astype("<i8", copy=False).tobytes(),
        history.request_groups.numpy().astype("<i8", copy=False).tobytes(),
        b""
        if history.logprobs is None
        else history.logprobs.numpy().astype("<f4", copy=False).tobytes(),
    )


def unpack_history(packed: PackedHistory) -> History:
    """Inverse of `pack_history`."""
    *arrays, logprobs = [
        torch.from_numpy(
            np.frombuffer(data, dtype).astype(dtype[1:])
        )  # a copy: torch wants to own what it gets
        for data, dtype in zip(packed, ("<i4", "<i8", "<i8", "<i8", "<f4"), strict=True)
    ]
    return History(*arrays, logprobs if logprobs.shape == arrays[0].shape else None)


class HistoryProposals:
    """What is proposed to the live requests of one rollout call.

    Args:
        history: Of the call.
        stop_token_ids: Of the call; never proposed.
        keyed: Whether the call draws with keyed noise, which then is looked at.
        cost: Decides with the drafter how much to propose.
        payoff: Decides whether to propose at all.
        shares: How proposals fared so far.
        max_proposal: Most tokens for one request.
        token_budget: Most tokens of one step; shared out evenly, so that nobody waits for another's proposal.
    """

    def __init__(
        self,
        history: History,
        stop_token_ids: list[int],
        keyed: bool,
        cost: StepCost,
        payoff: Payoff,
        shares: MatchShares,
        *,
        max_proposal: int,
        token_budget: int,
    ) -> None:
        self.num_requests = history.request_groups.numel()
        self._drafter = HistoryDrafter(history, stop_token_ids, shares)
        self._keyed = keyed
        self._cost = cost
        self._payoff = payoff
        self._max_proposal = max_proposal
        self._token_budget = token_budget
        self._outcomes: list[tuple[int, int]] = []
        self._num_indexed = np.zeros(self.num_requests, np.int64)  # tokens that the drafter knows
        self._batch: _Batch | None = None

    def tested(self, row: Row, accepted: int) -> None:
        """Of the last proposal to `row`, this many tokens passed; the next one, if there was one, did not."""
        self._outcomes.append((row.history_id, accepted))

    def pays(self, num_rows: int) -> bool:
        """Whether to propose anything in the next step of so many requests."""
        return self._payoff.pays(num_rows)

    def propose(
        self,
        rows: list[Row | None],
        sampled: list[list[int]],
        ends: np.ndarray,
        token_ids: np.ndarray,
        drafts: list[list[int]],
    ) -> None:
        """Learns what was sampled, and fills `drafts` where a request has none to follow.

        Args:
            rows: Of the batch.
            sampled: Tokens that each request was given in this step; none while its prefill is not finished.
            ends: Tokens of prompt and response so far. [batch].
            token_ids: Those tokens. [batch, longest].
            drafts: Per request; lists are replaced.
        """
        if self._outcomes:
            self._drafter.observe(*np.array(self._outcomes, np.int64).T.copy())
            self._outcomes = []
        if self._batch is None or self._batch.rows is not rows:
            self._batch = _Batch.of(rows)
        batch = self._batch
        given = np.fromiter(map(len, sampled), np.int64, len(sampled))
        where = np.flatnonzero((given > 0) & (batch.history_ids >= 0))
        if not where.size:
            return
        requests = batch.history_ids[where]
        # Not simply what was sampled: it may have been cut, or part of the tokens came another way.
        indices = ends[where] - batch.prompt_lens[where]
        known = self._num_indexed[requests]
        new = indices - known
        self._num_indexed[requests] = indices
        columns = np.repeat(batch.prompt_lens[where] + known, new) + ranges(new)
        tokens = token_ids[np.repeat(where, new), columns]
        self._drafter.extend(requests, tokens.astype(np.int32, copy=False), new)
        most = min(self._max_proposal, self._token_budget // len(rows) - 1)
        # The token drawn behind the proposal needs room, too.
        limits = np.minimum(batch.max_response_lens[where] - 1 - indices, most)
        is_free = np.fromiter((not rows[r].alive for r in where), bool, where.size)
        is_free &= limits > 0
        if not is_free.any() or not self.pays(len(rows)):
            return
        free = where[is_free]
        proposals = self._drafter.propose(
            requests[is_free],
            limits[is_free],
            self._cost.threshold(len(rows)),
            keys=batch.keys[free] if self._keyed else None,
            positions=batch.first_positions[free] + indices[is_free],
        )
        if proposals.token_ids.size == 0:
            return
        flat, start = proposals.token_ids.tolist(), 0
        counts = zip(free.tolist(), indices[is_free].tolist(), proposals.lens.tolist(), strict=True)
        for r, index, n in counts:
            if n:
                row = rows[r]
                row.proposed_at = index
                row.proposal = flat[start : start + n]
                row.proposal_ids = proposals.token_ids[start : start + n]
                drafts[r] = list(row.proposal)
                start += n


@dataclass(slots=True)
class _Batch:
    """What is fixed about the requests of a batch, as arrays; those without a history have the id -1."""

    rows: list[Row | None]
    history_ids: np.ndarray
    keys: np.ndarray
    prompt_lens: np.ndarray
    first_positions: np.ndarray
    max_response_lens: np.ndarray

    @classmethod
    def of(cls, rows: list[Row | None]) -> _Batch:
        numbers = np.array(
            [
                (-1, 0, 0, 0, 0)
                if row is None
                else (
                    row.history_id,
                    row.key,
                    row.prompt_len,
                    row.first_position,
                    row.max_response_len,
                )
                for row in rows
            ],
            np.int64,
        ).reshape(-1, 5)
        return cls(rows, *numbers.T.copy())
