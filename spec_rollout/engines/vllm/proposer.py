"""The drafter vLLM is given: `speculative_config={"method": "custom_class", "model":
"...proposer.ReuseProposer"}`.

It proposes the next chunk of each request's cached response while that is being accepted;
afterwards, what the prompt's other rollouts suggest, where the engine was given a history, and
nothing otherwise. It is created in every worker process before the model is loaded, which is where
the hooks of `compat` are installed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from spec_rollout.engines.vllm import compat
from spec_rollout.engines.vllm.worker.history import HistoryProposals
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.sampler import ReuseSampler
from spec_rollout.types import History

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CONFIG_SECTION = "spec_rollout"
DEFAULT_FIRST_CHUNK = 16


class ReuseProposer:
    """vLLM's `custom_class` proposer interface, and the owner of the sampler that verifies.

    Chunks start at `first_chunk` tokens and double with every chunk that is accepted whole, up to
    `num_speculative_tokens`: what is wasted at the first rejection stays in proportion to what was
    gained.

    Args:
        vllm_config: `additional_config={"spec_rollout": {"first_chunk": n}}` changes the first
            chunk (16).

    Raises:
        ValueError: if `first_chunk` is no positive integer, or a chunk does not fit into vLLM's
            token budget.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        compat.install_worker()
        options = (vllm_config.additional_config or {}).get(_CONFIG_SECTION, {})
        max_chunk = vllm_config.speculative_config.num_speculative_tokens
        first_chunk = options.get("first_chunk", DEFAULT_FIRST_CHUNK)
        if not isinstance(first_chunk, int) or first_chunk < 1:
            raise ValueError(f"first_chunk: expected a positive integer, got {first_chunk!r}")
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        if max_chunk >= budget:
            # vLLM would wait forever to admit a request whose prompt is cached but for one token.
            raise ValueError(
                f"num_speculative_tokens: expected fewer than max_num_batched_tokens ({budget}), "
                f"got {max_chunk}"
            )
        self.first_chunk = min(first_chunk, max_chunk)
        self.token_budget = budget
        self.sampler = ReuseSampler(max_chunk)
        # vLLM's records of the requests of the last step, and our rows of them: mostly the next
        # step has the same.
        self.last_batch: tuple[list[Any], list[Row | None]] = ([], [])
        compat.keep_cpu_weights()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no model to load."""

    def begin(
        self,
        num_requests: int,
        history: History | None,
        stop_token_ids: list[int],
        keyed: bool,
    ) -> None:
        """A rollout call begins, whose requests have the `collect_id`s from 0 to `num_requests` -
        1.

        `keyed`: their tokens are drawn with keyed noise, not greedily.
        """
        self.last_batch = ([], [])
        proposals = None
        if history is not None:
            proposals = HistoryProposals(
                history,
                stop_token_ids,
                keyed,
                self.sampler.cost,
                self.sampler.payoff,
                self.sampler.match_shares,
                max_proposal=self.sampler.max_chunk,
                token_budget=self.token_budget,
            )
        self.sampler.begin(num_requests, proposals)

    def history_id(self, collect_id: int) -> int:
        """A request's number in the history of the call, or -1."""
        history = self.sampler.history
        return collect_id if history is not None and collect_id < history.num_requests else -1

    def can_follow(self, collect_id: int) -> bool:
        """Whether the drafter can be given this request's draft, for the noise to be looked at."""
        history = self.sampler.history
        return history is not None and history.keyed and self.history_id(collect_id) >= 0

    def added(self, row: Row) -> None:
        """A request was seen for the first time."""
        if row.draft_len:
            self.sampler.metrics.draft_added(row.draft_len)
        if row.follows and self.sampler.history is not None:
            self.sampler.history.follow(row)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft tokens per request of the batch; an empty list where there is nothing to
        propose."""
        sampler = self.sampler
        batch = sampler.known
        step = sampler.metrics.num_engine_steps
        drafts: list[list[int]] = [[] for _ in batch.rows]
        oldest = batch.oldest_step
        if oldest is None or not batch.is_plain:
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
                    drafts[r] = row.propose(int(num_tokens_no_spec[r]) - row.prompt_len)
            if all_begun:
                batch.oldest_step = oldest
        sampler.metrics.max_row_steps = max(sampler.metrics.max_row_steps, step - oldest)
        if sampler.history is not None:
            sampler.history.propose(
                batch,
                sampled_token_ids,
                sampler.given_logprobs,
                num_tokens_no_spec,
                token_ids_cpu,
                drafts,
            )
        sampler.end_step(time.perf_counter())
        return drafts
