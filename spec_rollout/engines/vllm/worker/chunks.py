"""What is proposed in each step: a request's draft in chunks, then what its history suggests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from spec_rollout.drafting import HistoryDrafter
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker.engine_history import EngineHistory
from spec_rollout.engines.vllm.worker.engine_side import EngineSide
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.history import HistoryProposals
from spec_rollout.engines.vllm.worker.live import LiveRequests
from spec_rollout.engines.vllm.worker.masks import LogitMasks
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.sampler import ReuseSampler
from spec_rollout.engines.vllm.worker.sharing import HistorySharing
from spec_rollout.types import History


class ChunkProposer:
    """Proposes the next tokens of every request, and owns the sampler that tests them.

    A draft is proposed chunk by chunk while it is being accepted. Chunks start at `first_chunk`
    tokens and double with every chunk that is accepted whole, up to `max_chunk`: what is wasted at
    the first rejection stays in proportion to what was gained. Where a request has no draft to
    follow, what the prompt's other rollouts suggest is proposed, if the call has a history.

    Args:
        first_chunk, max_chunk: In tokens.
        token_budget: Most tokens of one step.

    Attributes:
        live: Requests that the engine serves by itself, or None where it does not.
        last_batch: vLLM's records of the requests of the last step, and our rows of them. Mostly
            the next step has the same.
    """

    def __init__(self, *, first_chunk: int, max_chunk: int, token_budget: int) -> None:
        self.first_chunk = first_chunk
        self.token_budget = token_budget
        self.sampler = ReuseSampler(max_chunk)
        self.live: LiveRequests | None = None
        self._is_drawn = True  # tokens of the call, with its requests' noise
        self.last_batch: tuple[list[Any], list[Row | None]] = ([], [])

    def serve_by_itself(
        self,
        side: EngineSide,
        write_log: Callable[[str], None],
        sharing: HistorySharing | None = None,
    ) -> None:
        """From now on requests that no rollout call announced are served, too.

        Args:
            side: Decides what each is served with.
            write_log: Takes a line for the log now and then.
            sharing: Of what is remembered, with other engines.
        """
        times = self.sampler.times
        history = EngineHistory(
            side.options.history_bytes,
            times.payoff,
            self.sampler.match_shares,
            max_proposal=self.sampler.max_chunk,
            token_budget=self.token_budget,
            sharing=sharing,
            tells_late=not side.has_peers,
        )
        side.recall = history.recall
        self.live = LiveRequests(
            side,
            history,
            first_chunk=self.first_chunk,
            metrics=lambda: self.sampler.record.metrics,
            write_log=write_log,
        )
        self.sampler.record.standing_history = history
        self.sampler.begin(0, None)

    @property
    def in_call(self) -> bool:
        """Whether a rollout call with a history of its own is in progress."""
        record = self.sampler.record
        return record.history is not None and record.history is not record.standing_history

    def begin(
        self,
        num_requests: int,
        history: History | None,
        stop_token_ids: list[int],
        keyed: bool,
    ) -> None:
        """A rollout call begins.

        Args:
            num_requests: Their `collect_id`s go from 0 to `num_requests` - 1.
            history: To propose from, or None.
            stop_token_ids: Of the call.
            keyed: Tokens are drawn with keyed noise, not greedily.
        """
        self.last_batch = ([], [])
        self._is_drawn = keyed
        proposals = None
        if history is not None:
            proposals = HistoryProposals(
                HistoryDrafter(history, stop_token_ids, self.sampler.match_shares),
                history.request_groups.numel(),
                self.sampler.times.payoff,
                max_proposal=self.sampler.max_chunk,
                token_budget=self.token_budget,
            )
        self.sampler.begin(num_requests, proposals)

    def end(self) -> ReuseMetrics:
        """The call is over; its counters."""
        return self.sampler.end()

    def take(self) -> tuple[bytes, ...]:
        """What was recorded since the last call (`Record.take`)."""
        return self.sampler.record.take()

    def take_metrics(self, reset: bool) -> ReuseMetrics:
        """Counters as they are now, optionally starting them anew."""
        record = self.sampler.record
        metrics = record.metrics
        if reset:
            record.metrics = ReuseMetrics()
        return metrics

    def new_row(
        self,
        request: ReuseRequest,
        *,
        prompt_len: int,
        max_response_len: int,
        stop_token_ids: frozenset[int],
        masks: LogitMasks | None,
    ) -> Row:
        """Our state of a request that was seen for the first time; see `Row`."""
        record = self.sampler.record
        history = record.history if self.in_call else None
        collect_id = record.claim(request.collect_id)
        history_id = -1
        if history is not None and collect_id < history.num_requests:
            history_id = collect_id
        row = Row(
            request,
            collect_id=collect_id,
            prompt_len=prompt_len,
            max_response_len=max_response_len,
            stop_token_ids=stop_token_ids,
            first_chunk=self.first_chunk,
            masks=masks,
            history_id=history_id,
            is_drawn=self._is_drawn,
        )
        if row.draft_len:
            record.metrics.draft_added(row.draft_len)
        if row.follows and history is not None:
            history.follow(row)
        return row

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft tokens for the next step.

        Args:
            sampled_token_ids: Tokens that each request was given in this step.
            num_tokens_no_spec: Tokens of prompt and response so far. [batch].
            token_ids_cpu: Those tokens. [batch, longest].
            slot_mappings: Not used.

        Returns:
            Per request; empty where there is nothing to propose.

        Raises:
            ValueError: if a kernel has met bad values in the step (CUDA).
        """
        sampler = self.sampler
        sampler.record.arrive()
        batch, metrics = sampler.known, sampler.record.metrics
        drafts: list[list[int]] = [[] for _ in batch.rows]
        step = metrics.num_engine_steps
        oldest = batch.oldest_step
        if oldest is None or not batch.is_plain:
            oldest = self._next_chunks(batch, sampled_token_ids, num_tokens_no_spec, drafts, step)
        metrics.max_row_steps = max(metrics.max_row_steps, step - oldest)
        record = sampler.record
        if record.history is not None:
            record.history.propose(
                batch,
                sampled_token_ids,
                record.drawn,
                record.given_logprobs,
                num_tokens_no_spec,
                token_ids_cpu,
                drafts,
            )
        sampler.times.end_step()
        if self.live is not None:
            num_rows = num_tokens = len(batch.rows)
            if record.drawn is None:
                given = [len(tokens) for tokens in sampled_token_ids]
                num_rows, num_tokens = len(given) - given.count(0), sum(given)
            self.live.end_step(num_rows, num_tokens)
        return drafts

    @staticmethod
    def _next_chunks(
        batch: Known,
        sampled_token_ids: list[list[int]],
        lens: np.ndarray,
        drafts: list[list[int]],
        step: int,
    ) -> int:
        """Fills `drafts` for the requests that follow one.

        Returns:
            The step that gave the first token to the request that has run longest.
        """
        oldest, all_begun = step, True
        for r, (row, sampled) in enumerate(zip(batch.rows, sampled_token_ids, strict=True)):
            if row is None:
                continue
            if not sampled:
                all_begun = all_begun and row.first_step >= 0
                continue
            if row.first_step < 0:
                row.first_step = step
            elif row.first_step < oldest:
                oldest = row.first_step
            if row.alive:
                drafts[r] = row.propose(int(lens[r]) - row.prompt_len)
        if all_begun:
            batch.oldest_step = oldest
        return oldest
