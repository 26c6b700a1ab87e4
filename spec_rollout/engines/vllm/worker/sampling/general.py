"""Any step: drafts, proposals, plain requests, and requests that are vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.engines.vllm.worker.groups import Group, Known, Segment
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.sampling.base import SAMPLED, Runs, Sampled, Step
from spec_rollout.engines.vllm.worker.sampling.record import Record
from spec_rollout.engines.vllm.worker.sampling.segments import segments_by_rule
from spec_rollout.engines.vllm.worker.transfer import copying, to_device
from spec_rollout.engines.vllm.worker.verify import verify_group
from spec_rollout.packed import ranges


class General:
    """One group of logits rows per acceptance rule; vLLM's sampler for requests without a key.

    Args:
        record: Where it is written down.
        max_chunk: Chunks of a draft double up to so many tokens.
    """

    def __init__(self, record: Record, max_chunk: int) -> None:
        self._record = record
        self._max_chunk = max_chunk

    def serve(self, step: Step, known: Known) -> Sampled:
        """See `Path.serve`; every step is served."""
        batch = len(step.rows)
        counts = [1] * batch if step.scheduled is None else [len(s) + 1 for s in step.scheduled]
        first_rows = np.zeros(batch + 1, np.int64)
        np.cumsum(counts, out=first_rows[1:])
        tokens = np.full((batch, max(counts)), -1, np.int32)
        if self._record.history is not None:
            self._record.expect_logprobs(tokens.shape)
        emitted: Runs = []
        logprobs = step.logprobs

        stock = [r for r, row in enumerate(step.rows) if row is None]
        stock_output = None
        if stock:
            # Whatever drafts vLLM made up for them, their next token is sampled from the first row.
            self._record.metrics.num_placeholder_tokens += sum(counts[r] - 1 for r in stock)
            rows_of = to_device(first_rows[:-1], step.logits.device)
            stock_output = step.sample_stock(step.logits[rows_of])
            stock_tokens = copying(stock_output.sampled_token_ids[:, 0])

        if len(stock) < batch:
            groups, plain = segments_by_rule(step, first_rows, self._record)
            default = next(iter(groups), SAMPLED)
            owns_all = len(groups) <= 1 and not stock
            begun = []
            for rule in groups or [default]:
                group = Group.of(
                    groups.get(rule, []),
                    plain if rule is default else [],
                    step.lens,
                    known,
                    first_rows,
                )
                group = group if owns_all else group.read_only()
                if group.requests.size:
                    begun.append((group, *self._begin(step, rule, group, owns_all)))
            # All are on their way before the first is waited for.
            for group, draft_ids, tested in begun:
                self._settle_all(step, group, draft_ids, tested(), tokens, emitted)
        if stock:
            tokens[stock, 0] = stock_tokens()[stock]

        output = torch.from_numpy(tokens)
        if logprobs is None:
            return output, None
        return output, logprobs.scatter(step.logits, tokens.shape, emitted, stock, stock_output)

    @staticmethod
    def _begin(
        step: Step, rule: AcceptanceRule, group: Group, owns_all: bool
    ) -> tuple[np.ndarray, Callable[[], list[np.ndarray]]]:
        """Begins the test of a group.

        Args:
            step, rule, group: What is tested, and how.
            owns_all: All rows of the step are the group's.

        Returns:
            The tokens tested, and `verify_group`'s results.
        """
        device = step.logits.device
        logits = step.logits
        if not owns_all:
            wanted = np.repeat(group.first_rows, group.num_rows) + ranges(group.num_rows)
            logits = logits[to_device(wanted, device)]
        requests = group.requests
        sampling: tuple[Any, Any, Any] = (step.temperature, step.top_k, step.top_p)
        if requests.size != len(step.rows) or not bool((requests[1:] > requests[:-1]).all()):
            where = to_device(requests, device)
            temperature, top_k, top_p = (
                value[where] if isinstance(value, torch.Tensor) else value for value in sampling
            )
            sampling = temperature, top_k, top_p
        draft_ids, draft_logprobs = group.drafts(rule.needs_draft_logprobs)
        return draft_ids, verify_group(rule, group, logits, sampling, draft_ids, draft_logprobs)

    def _settle_all(
        self,
        step: Step,
        group: Group,
        draft_ids: np.ndarray,
        tested: list[np.ndarray],
        tokens: np.ndarray,
        emitted: Runs,
    ) -> None:
        """Books the outcome of a group; arguments as in `Record.given`."""
        accepted, drawn, logprobs = tested
        self._record.given(
            step, group, draft_ids, accepted.astype(np.int64), drawn, logprobs, tokens, emitted
        )
        for i, segment in zip(group.places, group.segments, strict=True):
            if segment.row is not None:
                self._settle(segment, segment.row, int(accepted[i]), int(drawn[i]))

    def _settle(self, segment: Segment, row: Row, accepted: int, token: int) -> None:
        """Books the outcome of one request that something was tested for."""
        record, index = self._record, segment.index
        metrics = record.metrics
        if not segment.is_draft:
            own = segment.num_own
            record.proposals_tested(segment.num_tested, own, accepted, min(accepted, own))
            # Where all passed that was scheduled, nothing is known of the rest.
            is_known = segment.is_whole or accepted < segment.num_tested
            if segment.learn and is_known and record.history is not None:
                record.history.tested(np.array([row.history_id]), np.array([accepted]))
        elif segment.num_tested:
            metrics.chunk_tested(index, segment.num_tested, accepted, segment.num_proposed)
            if accepted < segment.num_tested:
                row.alive = False
            elif index + accepted >= row.draft_len:
                row.alive = False
                metrics.num_fully_reused += 1
                metrics.num_verified_tokens += token < 0 and not row.ends
            else:
                # The last accepted token is the next step's input.
                metrics.num_verified_tokens += 1
            if row.alive and segment.num_proposed >= row.chunk:
                row.chunk = min(2 * row.chunk, self._max_chunk)
            if accepted and row.collect_id >= 0:
                record.collector.reused(row.collect_id, accepted)
