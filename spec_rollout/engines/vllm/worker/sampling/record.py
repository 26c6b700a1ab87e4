"""What the requests of a rollout call were given, written down in one place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.worker.collect import Collector
from spec_rollout.engines.vllm.worker.groups import Group
from spec_rollout.engines.vllm.worker.history import HistoryProposals
from spec_rollout.engines.vllm.worker.sampling.base import Runs, Step
from spec_rollout.packed import ranges


class Record:
    """Shared by all ways of sampling, and read by the proposer.

    Attributes:
        metrics: Counters of the call.
        collector: Log-probs and reused tokens, for the engine to fetch.
        history: What is proposed from in this call, or None.
        standing_history: What is proposed from between calls, or None.
        arriving: Of a step that gave one token to each request: what it gave, on its way to the
            host (`transfer.arriving`), or nothing where no history wants it; None in other steps.
        drawn: The same once it is there (`arrive`), or None.
        given_logprobs: Of the tokens given out in any other step, where somebody wants them.
            [batch, most tokens], float32, or None.
        num_kept: Tokens of proposals kept in this step.
    """

    def __init__(self) -> None:
        self.standing_history: HistoryProposals | None = None
        self.begin(0, None)

    def begin(self, num_requests: int, history: HistoryProposals | None) -> None:
        """A rollout call begins; what was left of an earlier one is forgotten.

        Its requests have the collect ids 0 to `num_requests` - 1.
        """
        self.metrics = ReuseMetrics()
        self.collector = Collector()
        self._unclaimed = set(range(num_requests))
        self.history = self.standing_history if history is None else history
        self.arriving: Callable[[], list[np.ndarray]] | None = None
        self.drawn: ops.SampleResult | None = None
        self.given_logprobs: np.ndarray | None = None
        self.num_kept = 0

    def claim(self, collect_id: int) -> int:
        """The number under which a new request is written down, -1 for nowhere.

        Only the engine's own calls fetch what is written down, so only the ids that they announced
        count, each once: another client's would be kept for ever, or take a call's place.
        """
        if collect_id in self._unclaimed:
            self._unclaimed.remove(collect_id)
            return collect_id
        self.metrics.num_unknown_ids += collect_id >= 0
        return -1

    def begin_step(self) -> None:
        """Nothing was given out yet."""
        self.arriving = self.drawn = self.given_logprobs = None

    def arrive(self) -> None:
        """The step's tokens are on the host.

        Raises:
            ValueError: if a kernel has met bad values in the step, or before (CUDA).
        """
        if self.arriving is None:
            return
        found, self.arriving = self.arriving(), None
        if found:
            self.drawn = ops.SampleResult(*map(torch.from_numpy, found))

    def expect_logprobs(self, shape: tuple[int, ...]) -> None:
        """`given` is to fill `given_logprobs` [batch, most tokens]."""
        self.given_logprobs = np.full(shape, np.nan, np.float32)

    def given(
        self,
        step: Step,
        group: Group,
        draft_ids: np.ndarray,
        accepted: np.ndarray,
        drawn: np.ndarray,
        logprobs: np.ndarray,
        tokens: np.ndarray,
        emitted: Runs,
    ) -> None:
        """What a group of requests was given.

        Args:
            step, group: The group's step.
            draft_ids: Tokens tested. [sum(group.num_tested)], int32.
            accepted: How many of them passed. [group], int64.
            drawn: The token after those, -1: none. [group], int32.
            logprobs: Of what each logits row gave. [sum(group.num_rows)], float32.
            tokens: Filled with what each request was given. [batch, most tokens], int32.
            emitted: The same, added where vLLM wants log-probs.
        """
        was_drawn = (drawn >= 0) & group.is_read
        accepted = np.where(group.is_read, accepted, 0)
        from_draft = np.flatnonzero(accepted)
        if from_draft.size:
            counts = accepted[from_draft]
            columns = ranges(counts)
            sources = np.repeat(group.first_tokens[from_draft], counts) + columns
            tokens[np.repeat(group.requests[from_draft], counts), columns] = draft_ids[sources]
        tokens[group.requests[was_drawn], accepted[was_drawn]] = drawn[was_drawn]
        kept = accepted + was_drawn
        firsts = np.cumsum(group.num_rows) - group.num_rows  # of the rows in `logprobs`
        if group.any_collected:
            collected = np.where(group.collect_ids >= 0, kept, 0)
            offsets = ranges(collected)
            self.collector.add(
                np.repeat(group.collect_ids, collected),
                (np.repeat(group.indices, collected) + offsets).astype(np.int32),
                torch.from_numpy(logprobs[np.repeat(firsts, collected) + offsets]),
            )
        if self.given_logprobs is not None:
            offsets = ranges(kept)
            self.given_logprobs[np.repeat(group.requests, kept), offsets] = logprobs[
                np.repeat(firsts, kept) + offsets
            ]
        if step.logprobs is not None:
            for i in np.flatnonzero(group.is_read).tolist():
                request, n, first = int(group.requests[i]), int(kept[i]), int(firsts[i])
                row = int(group.first_rows[i])
                emitted.append((request, row, tokens[request, :n], logprobs[first : first + n]))

    def proposals_tested(
        self, num_tokens: int, num_own: int, num_accepted: int, num_own_accepted: int
    ) -> None:
        """Proposals of the drafter; arguments as in `ReuseMetrics.proposals_tested`."""
        self.num_kept += num_accepted
        self.metrics.proposals_tested(num_tokens, num_own, num_accepted, num_own_accepted)

    def take(self) -> tuple[bytes, ...]:
        """What was recorded of the finished requests (`Collector.take`)."""
        if self.history is not None:
            for row, followed, tested in self.history.followed():
                self.metrics.draft_followed(followed, tested, row.draft_len)
                if followed and row.collect_id >= 0:
                    self.collector.reused(row.collect_id, followed)
        return self.collector.take()
