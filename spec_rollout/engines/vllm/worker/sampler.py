"""Sampling of one engine step: drafts verified and tokens drawn from the logits vLLM hands over.

vLLM has computed, for request r, logits after its last token and after each of the n_r draft tokens
scheduled for it: n_r + 1 rows. Row i predicts response token j_r + i. Every row is tested against
the draft token of its position where there is one: also the row at the end of a prompt's prefill
(n_r = 0), and the last row of a chunk (vLLM's "bonus"), so that an accepted draft never loses a
step at a chunk border.

What was proposed from history instead of a draft is tested for being what sampling gives, under
every rule.
"""

from __future__ import annotations

import numpy as np

from spec_rollout.drafting import MatchShares
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.history import HistoryProposals
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.sampling.base import Path, Sampled, Step
from spec_rollout.engines.vllm.worker.sampling.general import General
from spec_rollout.engines.vllm.worker.sampling.plain import PlainDraws
from spec_rollout.engines.vllm.worker.sampling.proposals import ProposalsOnly
from spec_rollout.engines.vllm.worker.sampling.record import Record
from spec_rollout.engines.vllm.worker.step_times import StepTimes


class ReuseSampler:
    """Draws the tokens of every request that has a noise key; leaves the others to vLLM's sampler.

    Args:
        max_chunk: Most draft tokens of a request in one step.

    Attributes:
        paths: Ways to sample a step; the first that serves it does. The last one serves any.
        record: What the current rollout call has given out.
        times: What steps take.
        match_shares: How proposals fared so far; lives as long as the engine.
        known: What is fixed about the requests of the last step; the proposer reads it.
    """

    def __init__(self, max_chunk: int) -> None:
        self.max_chunk = max_chunk
        self.record = Record()
        self.times = StepTimes(self.record)
        self.match_shares = MatchShares()
        self.known = Known.of([])
        self.paths: tuple[Path, ...] = (
            PlainDraws(self.record),
            ProposalsOnly(self.record),
            General(self.record, max_chunk),
        )

    def __call__(self, step: Step) -> Sampled:
        """Samples one step."""
        self.record.begin_step()
        # The list is the same object as long as the batch is the same.
        if self.known.rows is not step.rows:
            self.known = Known.of(step.rows)
        step.is_plain = self.known.needs_only_draws() and not step.discard.any()
        self._mask(step)
        for path in self.paths:
            sampled = path.serve(step, self.known)
            if sampled is not None:
                return sampled
        raise AssertionError("the last way to sample serves every step")

    def _mask(self, step: Step) -> None:
        """Restricts the vocabulary of requests that want that, in `step.logits`."""
        known, masks = self.known, self.known.masks
        restricts = False
        if masks is not None:
            positions = step.lens - known.prompt_lens + known.first_positions
            restricts = masks.restrict(positions)
        if step.logprobs is not None:
            step.logprobs.keep_raw(step.logits, restricts)
        if masks is None or not restricts:
            return
        num_rows = np.ones(len(step.rows), np.int64)
        if step.scheduled is not None:
            num_rows += np.fromiter(map(len, step.scheduled), np.int64, num_rows.size)
        first_rows = np.cumsum(num_rows) - num_rows
        # Some rows are read by nobody (prefill not finished, drafts that vLLM made up). To leave
        # them out would take more than it saves.
        masks.apply(step.logits, first_rows, num_rows, positions)

    def leave(self, rows: list[Row | None]) -> None:
        """A step whose requests, all without a key, are vLLM's to sample."""
        self.known = Known.of(rows)

    def begin(self, num_requests: int, history: HistoryProposals | None) -> None:
        """A rollout call of so many requests begins; what was left of an earlier one is dropped."""
        self.record.begin(num_requests, history)
        self.times.begin(num_requests)

    def end(self) -> ReuseMetrics:
        """The call is over; its counters."""
        metrics = self.record.metrics
        self.begin(0, None)
        return metrics
