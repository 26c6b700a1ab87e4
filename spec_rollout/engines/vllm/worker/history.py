"""Proposals from other rollouts, for requests that follow no draft in chunks.

The engine sends the history of a rollout call once, ahead of its requests
(`ReuseWorker.spec_rollout_begin`), and a request says which it is by its `collect_id`. So nothing
is sent twice, and every worker of a tensor-parallel engine gets it. The index is built by several
threads before the first step, and is gone when the call ends.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from spec_rollout import ops
from spec_rollout.drafting import Drafter, Payoff, Proposals
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.late_tokens import LateTokens
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.packed import ranges


class HistoryProposals:
    """What is proposed to live requests.

    Args:
        drafter: Knows the history; its requests are numbered as they are here.
        num_requests: Of the rollout call.
        payoff: Decides with the drafter how much to propose, and whether to propose at all.
        max_proposal: Most tokens for one request.
        token_budget: Most tokens of one step; the longest proposals are cut to it, so that nobody
            waits for another's.
        tells_late: The drafter may be told some steps later what requests were given. When, depends
            on what steps took.
    """

    def __init__(
        self,
        drafter: Drafter,
        num_requests: int,
        payoff: Payoff,
        *,
        max_proposal: int,
        token_budget: int,
        tells_late: bool = True,
    ) -> None:
        self.num_requests = num_requests
        self._drafter = drafter
        self._payoff = payoff
        self._max_proposal = max_proposal
        self._token_budget = token_budget
        self._outcomes: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_known = np.zeros(self.num_requests, np.int64)  # tokens that the drafter has
        self._late = LateTokens()
        self._tells_late = tells_late
        self._has_proposed = False  # in the last step
        # The last proposals: by request, for which token of the response they start (-1: none), how
        # many tokens, how many of these are the request's draft's, where they stand in the flat
        # list, and how many are expected to pass.
        self._proposed_at = np.full(self.num_requests, -1, np.int64)
        self._lens = np.zeros(self.num_requests, np.int64)
        self._own_lens = np.zeros(self.num_requests, np.int64)
        self._starts = np.zeros(self.num_requests, np.int64)
        self._expected = np.zeros(self.num_requests, np.float32)
        self._flat = np.empty(0, np.int32)
        self._followers: dict[int, Row] = {}

    def _handles(self, requests: np.ndarray) -> np.ndarray:
        """What the drafter calls these requests. [count], int64."""
        return requests

    def follow(self, row: Row) -> None:
        """From now on the drafter knows the draft of this request."""
        assert row.draft_logprobs is not None
        self._drafter.follow(row.history_id, row.draft.copy(), row.draft_logprobs.copy())
        self._followers[row.history_id] = row

    def followed(self) -> list[tuple[Row, int, int]]:
        """Of each request that `follow` was called for: (row, tokens kept of its draft, tested)."""
        self._tell_late()
        lens = {i: self._drafter.followed_len(i) for i in self._followers}
        return [
            (
                row,
                lens[i],
                min(int(lens[i]) + 1, row.draft_len, int(self._num_known[i])),
            )
            for i, row in self._followers.items()
        ]

    def tested(self, history_ids: np.ndarray, accepted: np.ndarray) -> None:
        """Of the last proposals to these requests, this many tokens passed, and no more.

        [count], int64 both.
        """
        self._outcomes.append((history_ids, accepted))

    def scheduled(
        self, known: Known, indices: np.ndarray, scheduled: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The tokens to test of a whole batch, if vLLM scheduled just what was proposed last.

        Args:
            known: The batch; every request with a key.
            indices: Response token that each request's proposal is for. [batch].
            scheduled: Per request.

        Returns:
            Flat tokens int32, how many of each request, and how many of these are its draft's; or
            None.
        """
        ids = known.history_ids
        if self.num_requests == 0 or (ids < 0).any():
            return None
        lens, own_lens = self.last_lens(ids, indices)
        if not np.array_equal(lens, np.fromiter(map(len, scheduled), np.int64, len(scheduled))):
            return None
        tokens = self._flat[np.repeat(self._starts[ids], lens) + ranges(lens)]
        found = np.fromiter(chain.from_iterable(scheduled), np.int64, tokens.size)
        if not np.array_equal(tokens, found):
            return None
        return tokens, lens, own_lens

    def last_lens(self, ids: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens were proposed last to these requests, for their response tokens `indices`
        and after, and how many of these are their drafts'. [count], int64 all."""
        is_now = self._proposed_at[ids] == indices
        return np.where(is_now, self._lens[ids], 0), np.where(is_now, self._own_lens[ids], 0)

    def scheduled_one(
        self, row: Row, index: int, scheduled: list[int]
    ) -> tuple[np.ndarray, int, int]:
        """The scheduled tokens to test of one request, whatever their origin.

        A token passes only if sampling gives it. vLLM's own inventions (-1) are left out. With
        tensor parallelism the proposals of one worker are tested by all.

        Returns:
            The tokens, how many were proposed (-1: they are not what was proposed last), and how
            many of these are the request's draft's.
        """
        i = row.history_id
        if i < 0:
            return np.empty(0, np.int32), -1, 0
        tokens = np.array(scheduled, np.int32)
        if self._proposed_at[i] == index:
            start, num = int(self._starts[i]), int(self._lens[i])
            proposed = self._flat[start : start + num]
            if np.array_equal(tokens, proposed[: tokens.size]):
                return tokens, num, min(int(self._own_lens[i]), tokens.size)
        invented = np.flatnonzero(tokens < 0)
        if invented.size:
            tokens = tokens[: int(invented[0])]
        return tokens, -1, 0

    def propose(
        self,
        batch: Known,
        sampled: list[list[int]],
        drawn: ops.SampleResult | None,
        logprobs: np.ndarray | None,
        ends: np.ndarray,
        token_ids: np.ndarray,
        drafts: list[list[int]],
    ) -> None:
        """Learns what was sampled, and fills `drafts` where a request has none to follow.

        Args:
            batch: The requests.
            sampled: Tokens that each request was given in this step; none while its prefill is not
                finished.
            drawn: The same and their log-probs, on the host, if each was given one. [batch].
            logprobs: Of the tokens of any other step, NaN where not known; None: not known at all.
                [batch, most tokens], float32.
            ends: Tokens of prompt and response so far. [at least batch].
            token_ids: Those tokens. [batch, longest].
            drafts: Per request; lists are replaced.
        """
        if self._has_proposed:
            self._proposed_at.fill(-1)
            self._has_proposed = False
        for history_ids, accepted in self._outcomes:
            self._drafter.observe(self._handles(history_ids), accepted)
            self._payoff.tested(float(self._expected[history_ids].sum()), int(accepted.sum()))
        self._outcomes = []
        asks = self._payoff.pays(len(batch.rows))
        may_wait = self._tells_late and not self._late.is_full
        if not asks and drawn is not None and batch.all_in_history and may_wait:
            self._late.add(batch.history_ids, drawn.token_ids, drawn.logprobs)
            return
        if drawn is not None:
            logprobs = drawn.logprobs.numpy()[:, None]
        given = np.fromiter(map(len, sampled), np.int64, len(sampled))
        where = np.flatnonzero((given > 0) & (batch.history_ids >= 0))
        if not where.size:
            return
        requests = batch.history_ids[where]
        # Not simply what was sampled: it may have been cut, or part of the tokens came another way.
        indices = ends[where] - batch.prompt_lens[where]
        self._tell(batch, where, indices, given, logprobs, token_ids)
        if not asks:
            return
        # The token drawn behind the proposal needs room, too.
        limits = np.minimum(batch.max_response_lens[where] - 1 - indices, self._max_proposal)
        is_free = limits > 0
        if not batch.is_plain:
            is_free &= np.array(
                [(row := batch.rows[r]) is None or not row.alive for r in where.tolist()], bool
            )
        if not is_free.any():
            return
        free, requests, indices = where[is_free], requests[is_free], indices[is_free]
        num_draft_tokens = sum(map(len, drafts))
        budget = min(
            max(0, self._token_budget - len(drafts) - num_draft_tokens),
            self._payoff.room(len(batch.rows)),
        )
        proposals = self._ask(batch, free, requests, indices, limits[is_free], budget)
        expected = float(proposals.expected.sum())
        num_tokens = proposals.token_ids.size
        if not self._payoff.worth(len(batch.rows), num_tokens, expected, beside=num_draft_tokens):
            return
        starts = np.cumsum(proposals.lens) - proposals.lens
        self._has_proposed = True
        self._proposed_at[requests] = indices
        self._lens[requests] = proposals.lens
        self._own_lens[requests] = proposals.own_lens
        self._expected[requests] = proposals.expected
        self._starts[requests] = starts
        self._flat = proposals.token_ids
        flat = proposals.token_ids.tolist()
        for r, start, n in zip(
            free.tolist(), starts.tolist(), proposals.lens.tolist(), strict=True
        ):
            if n:
                drafts[r] = flat[start : start + n]

    def _tell_late(self) -> None:
        """Now the drafter is told what was kept for later."""
        if self._late:
            slots, lens, tokens, logprobs = self._late.take()
            self._num_known[slots] += lens
            self._drafter.extend(self._handles(slots), tokens, lens, logprobs)

    def _tell(
        self,
        batch: Known,
        where: np.ndarray,
        indices: np.ndarray,
        given: np.ndarray,
        logprobs: np.ndarray | None,
        token_ids: np.ndarray,
    ) -> None:
        """Tells the drafter what requests were given.

        Args:
            batch: The requests of the step.
            where: Those that were given tokens: their places in the batch. [count].
            indices: Tokens of their responses so far. [count].
            given: Tokens that each request was given in this step. [batch].
            logprobs, token_ids: As in `propose`.
        """
        self._tell_late()
        requests = batch.history_ids[where]
        known = self._num_known[requests]
        new = indices - known
        self._num_known[requests] = indices
        rows, offsets = np.repeat(where, new), ranges(new)
        tokens = token_ids[rows, np.repeat(batch.prompt_lens[where] + known, new) + offsets]
        known_logprobs = None
        if logprobs is not None:
            # What came another way has none.
            fits = np.repeat(new == given[where], new)
            known_logprobs = np.where(fits, logprobs[rows, np.where(fits, offsets, 0)], np.nan)
        self._drafter.extend(
            self._handles(requests), tokens.astype(np.int32, copy=False), new, known_logprobs
        )

    def _ask(
        self,
        batch: Known,
        free: np.ndarray,
        requests: np.ndarray,
        indices: np.ndarray,
        limits: np.ndarray,
        budget: int,
    ) -> Proposals:
        """The drafter's proposals.

        Args:
            batch: The requests of the step.
            free, requests: Those that are asked for: their places in the batch, and what the
                drafter calls them here. [count].
            indices: Of the response token that is proposed first. [count].
            limits: Most tokens for each. [count].
            budget: Most tokens for all.
        """
        return self._drafter.propose(
            self._handles(requests),
            limits,
            self._payoff.threshold(len(batch.rows)),
            favours_longest=True,
            max_total=budget,
            keys=batch.keys[free],
            positions=batch.first_positions[free] + indices,
            # It says nothing of what greedy requests are given.
            with_noise=batch.is_drawn[free],
        )
