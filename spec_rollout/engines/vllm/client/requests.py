"""Between packed rollout requests and vLLM's request objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.wire import ReuseRequest, extra_args
from spec_rollout.origins import with_origins
from spec_rollout.packed import lens_to_stop
from spec_rollout.types import (
    Drafts,
    FinishReason,
    RolloutRequests,
    Rollouts,
    RolloutStats,
    SamplingParams,
)

_FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


def check_requests(
    requests: RolloutRequests,
    sampling: SamplingParams,
    rule: AcceptanceRule,
    *,
    vocab_size: int,
    max_model_len: int,
) -> None:
    """Raises ValueError, naming the argument, for what the engine could not serve."""
    for name, ids in (
        ("prompt_ids", requests.prompt_ids),
        ("draft_ids", requests.drafts.token_ids),
        *(() if requests.history is None else [("history.token_ids", requests.history.token_ids)]),
    ):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"{name}: expected token ids from 0 to {vocab_size - 1}, "
                f"got {int(ids.min())} to {int(ids.max())}"
            )
    for token in sampling.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"stop_token_ids: expected ids from 0 to {vocab_size - 1}, got {token}"
            )
    lens = requests.cu_prompt_lens.diff()
    if lens.numel() and int(lens.max()) >= max_model_len:
        raise ValueError(
            f"prompt_ids: expected prompts of at most {max_model_len - 1} tokens (max_model_len is "
            f"{max_model_len}), got one of {int(lens.max())}"
        )
    drafts = requests.drafts
    if rule.needs_draft_logprobs and drafts.token_ids.numel():
        if drafts.logprobs is None:
            raise ValueError(f"draft_logprobs: expected a tensor for {rule}, got None")
        if bool(drafts.logprobs.isnan().any()):
            raise ValueError("draft_logprobs: expected numbers, got NaN")


def _cut(drafts: Drafts, limits: torch.Tensor, stop_token_ids: Sequence[int]) -> Drafts:
    """Drafts cut to `limits` [batch] and after their first stop token."""
    to_stop, stopped = lens_to_stop(
        drafts.token_ids.numpy(), drafts.cu_lens.numpy(), stop_token_ids
    )
    lens = torch.minimum(torch.from_numpy(to_stop), limits)
    finished = torch.from_numpy(stopped & (to_stop <= limits.numpy()))
    cut = drafts.cut_to(lens)
    return Drafts(cut.token_ids, cut.cu_lens, cut.logprobs, finished)


@dataclass(frozen=True, slots=True)
class Job:
    """One batch for the engine: prompts and their drafts.

    Attributes:
        prompt_ids: Token ids per row; a reused prefix may be part of them.
        limits: Most tokens to generate per row, within the model's length.
        keys, first_positions: Of the noise; [batch].
        rule: The acceptance rule.
        drafts: To verify.
        prompt_logprobs: As in vLLM's SamplingParams.
        has_history: The call has one, so that a drafter wants the drafts' log-probs.
        order: Rows in the order in which vLLM gets them; None is as they are.
    """

    prompt_ids: list[list[int]]
    limits: list[int]
    keys: list[int]
    first_positions: list[int]
    rule: AcceptanceRule
    drafts: Drafts
    prompt_logprobs: int | None = None
    has_history: bool = False
    order: Sequence[int] | None = None

    @classmethod
    def of(
        cls,
        requests: RolloutRequests,
        sampling: SamplingParams,
        rule: AcceptanceRule,
        limits: Sequence[int],
        max_model_len: int,
    ) -> Job:
        """A job for whole responses.

        Drafts are cut to what a response can hold; there are none if the rule uses none.
        """
        room = max_model_len - requests.cu_prompt_lens.diff()
        limits_ = torch.minimum(torch.tensor(list(limits), dtype=torch.int64), room)
        use = rule.uses_drafts and requests.drafts.token_ids.numel()
        drafts = Drafts.none(requests.batch)
        if use:
            drafts = _cut(requests.drafts, limits_, sampling.stop_token_ids)
        return cls(
            prompt_ids=split(requests.prompt_ids, requests.cu_prompt_lens),
            limits=limits_.tolist(),
            keys=requests.keys.tolist(),
            first_positions=[0] * requests.batch,
            rule=rule,
            drafts=drafts,
            has_history=requests.history is not None,
            order=requests.longest_first(drafts.lens).tolist(),
        )

    @property
    def batch(self) -> int:
        return len(self.prompt_ids)

    def prompts(self) -> list[dict[str, list[int]]]:
        """As `LLM.generate` takes them."""
        return [{"prompt_token_ids": ids} for ids in self.prompt_ids]

    def extra_args(self, row: int) -> dict[str, Any]:
        """The reuse parameters of one row."""
        start, end = self.drafts.cu_lens[row : row + 2].tolist()
        logprobs = None
        if self.drafts.logprobs is not None:
            known = self.drafts.logprobs.numpy()[start:end]
            wanted = self.has_history and not np.isnan(known).any()
            if wanted or self.rule.needs_draft_logprobs:
                logprobs = known
        return extra_args(
            ReuseRequest(
                key=self.keys[row],
                rule=self.rule,
                draft_ids=self.drafts.token_ids.numpy()[start:end],
                draft_logprobs=logprobs,
                first_position=self.first_positions[row],
                collect_id=row,
            )
        )


@dataclass(slots=True)
class Responses:
    """Packed responses of a job.

    Attributes:
        ids: [num_tokens], int32.
        logprobs: [num_tokens], float32.
        cu_lens: [batch + 1], int64.
        accepted_lens: [batch], int32.
        finish_reasons: [batch], uint8.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    cu_lens: torch.Tensor
    accepted_lens: torch.Tensor
    finish_reasons: torch.Tensor

    @classmethod
    def of(cls, job: Job, outputs: Sequence[Any], collected: tuple[bytes, ...]) -> Responses:
        """From vLLM's completions, in the job's order, and what `spec_rollout_take` returned."""
        arrays = [np.asarray(output.token_ids, dtype=np.int32) for output in outputs]
        lens = np.array([array.size for array in arrays], np.int64)
        cu = np.concatenate([[0], np.cumsum(lens)])
        rows, indices, values, reused_rows, reused = (
            np.frombuffer(data, dtype)
            for data, dtype in zip(collected, ("<i4", "<i4", "<f4", "<i4", "<i4"), strict=True)
        )
        # Tokens drawn after a stop token, in the same chunk, were dropped by vLLM.
        kept = indices < lens[rows]
        logprobs = np.full(int(cu[-1]), np.nan, np.float32)
        logprobs[cu[rows[kept]] + indices[kept]] = values[kept]
        if np.isnan(logprobs).any():
            row = int(np.searchsorted(cu, np.flatnonzero(np.isnan(logprobs))[0], side="right")) - 1
            raise RuntimeError(
                f"log-probs: expected one per response token, got none for some of request {row}"
            )
        accepted = np.zeros(job.batch, np.int64)
        accepted[reused_rows] = reused
        return cls(
            ids=torch.from_numpy(np.concatenate([np.empty(0, np.int32), *arrays])),
            logprobs=torch.from_numpy(logprobs),
            cu_lens=torch.from_numpy(cu.astype(np.int64)),
            accepted_lens=torch.from_numpy(np.minimum(accepted, lens).astype(np.int32)),
            finish_reasons=torch.tensor(
                [_FINISH_REASONS.get(o.finish_reason, FinishReason.ABORT) for o in outputs],
                dtype=torch.uint8,
            ),
        )

    def pack(self, requests: RolloutRequests, policy_version: int, stats: RolloutStats) -> Rollouts:
        """As rollouts of the requests the job was made from."""
        rollouts = Rollouts(
            prompt_ids=requests.prompt_ids,
            cu_prompt_lens=requests.cu_prompt_lens,
            response_ids=self.ids,
            cu_response_lens=self.cu_lens,
            logprobs=self.logprobs,
            accepted_lens=self.accepted_lens,
            finish_reasons=self.finish_reasons,
            policy_version=policy_version,
            stats=stats,
        )
        return with_origins(rollouts, requests.drafts)

    def stats(self, drafts: Drafts, metrics: ReuseMetrics) -> RolloutStats:
        """Counts; the seconds are left to the caller."""
        num_reused = int(self.accepted_lens.sum())
        whole = (self.accepted_lens == drafts.lens) & drafts.finished
        # The worker counts the rest under the same names.
        return RolloutStats.from_counts(
            metrics,
            num_rollouts=self.accepted_lens.numel(),
            num_drafts=int((drafts.lens > 0).sum()),
            num_draft_tokens=drafts.token_ids.numel(),
            num_reused_tokens=num_reused,
            num_fully_reused=int(whole.sum()),
            num_response_tokens=self.ids.numel(),
            num_generated_tokens=self.ids.numel() - num_reused,
        )


def split(values: torch.Tensor, cu_lens: torch.Tensor) -> list[list[int]]:
    """Rows of a packed tensor as lists."""
    flat, cu = values.tolist(), cu_lens.tolist()
    return [flat[a:b] for a, b in pairwise(cu)]
