"""Proposals from a prompt's other rollouts, for requests that follow no draft.

The engine sends the history of a rollout call once, ahead of its requests (`ReuseWorker.spec_rollout_begin`), and a
request says which it is by its `collect_id`. So nothing is sent twice, every worker of a tensor-parallel engine gets it,
the index is built by several threads before the first step, and it is gone when the call ends.
"""

from __future__ import annotations

import numpy as np
import torch

from spec_rollout.drafting import HistoryDrafter, MatchShares, Payoff, StepCost
from spec_rollout.engines.vllm.rows import Row
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
        cost: StepCost,
        payoff: Payoff,
        shares: MatchShares,
        *,
        max_proposal: int,
        token_budget: int,
    ) -> None:
        self.num_requests = history.request_groups.numel()
        self._drafter = HistoryDrafter(history, stop_token_ids, shares)
        self._cost = cost
        self._payoff = payoff
        self._max_proposal = max_proposal
        self._token_budget = token_budget
        self._outcomes: list[tuple[int, int]] = []

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
        requests: list[int] = []
        tokens: list[int] = []
        lens: list[int] = []
        free: list[int] = []
        rooms: list[int] = []
        for r, (row, new) in enumerate(zip(rows, sampled, strict=True)):
            if row is None or row.history_id < 0 or not new:
                continue
            end = int(ends[r])
            index = end - row.prompt_len
            if index - len(new) != row.num_indexed:  # cut, or part of them came another way
                new = token_ids[r, row.prompt_len + row.num_indexed : end].tolist()
            row.num_indexed = index
            requests.append(row.history_id)
            tokens += new
            lens.append(len(new))
            if not row.alive:
                free.append(r)
                # The token drawn behind the proposal needs room, too.
                rooms.append(row.max_response_len - 1 - index)
        if not requests:
            return
        self._drafter.extend(
            np.array(requests, np.int64), np.array(tokens, np.int32), np.array(lens, np.int64)
        )
        most = min(self._max_proposal, self._token_budget // len(rows) - 1)
        limits = np.minimum(np.array(rooms, np.int64), most)
        if not free or limits.max() < 1 or not self.pays(len(rows)):
            return
        ids = np.array([rows[r].history_id for r in free], np.int64)
        proposals = self._drafter.propose(
            ids,
            limits,
            self._cost.threshold(len(rows)),
            keys=np.array([rows[r].key for r in free], np.int64),
            positions=np.array(
                [rows[r].first_position + rows[r].num_indexed for r in free], np.int64
            ),
        )
        if proposals.token_ids.size == 0:
            return
        flat, start = proposals.token_ids.tolist(), 0
        for r, n in zip(free, proposals.lens.tolist(), strict=True):
            if n:
                row = rows[r]
                row.proposed_at = row.num_indexed
                row.proposal = flat[start : start + n]
                row.proposal_ids = proposals.token_ids[start : start + n]
                drafts[r] = list(row.proposal)
                start += n
