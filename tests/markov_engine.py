"""A complete rollout engine over a bigram model, small enough to be read as the definition of the
rules.

It shares no code with the library's kernels: its noise is its own, the tests are written out per
row in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from spec_rollout.acceptance import AcceptanceRule, RuleKind
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import FinishReason, RolloutRequests, Rollouts, RolloutStats, SamplingParams


def uniforms(keys: np.ndarray, position: int, streams: np.ndarray) -> np.ndarray:
    """In (0, 1), a pure function of (key, position, stream). [batch], scalar, [n] -> [batch, n]."""
    x = keys[:, None] + np.uint64(0x9E3779B97F4A7C15 * (position + 1) % 2**64)
    for salt in (np.zeros(1, dtype=np.uint64), streams * np.uint64(0xD6E8FEB86659FD93)):
        x = x ^ salt
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        x = x ^ (x >> np.uint64(33))
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


class MarkovEngine:
    """The next token depends on the last one alone: logits [vocab, vocab] is the whole policy.

    Attributes:
        num_calls: Calls of `rollout` that passed the checks.
        abort_after: Rows over this index are given up after one token; None is never.
    """

    supports_history = False
    before_step: Callable[[], None] | None = None
    last_counters: None = None

    def __init__(self, logits: torch.Tensor, abort_after: int | None = None) -> None:
        self.logits = logits.double()
        self.policy_version = 0
        self.num_calls = 0
        self.abort_after = abort_after

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named_tensors:
            assert name == "logits"
            self.logits = tensor.double().clone()
        self.policy_version += 1

    def rollout(
        self, requests: RolloutRequests, sampling: SamplingParams, acceptance: AcceptanceRule
    ) -> Rollouts:
        """All rows in step, one position at a time; temperature is supported, filters are not."""
        vocab = self.logits.shape[0]
        if int(requests.prompt_ids.max()) >= vocab:
            raise ValueError(
                f"prompt_ids: expected < {vocab}, got {int(requests.prompt_ids.max())}"
            )
        self.num_calls += 1
        log_probs = torch.log_softmax(self.logits / sampling.temperature, -1).numpy()
        batch, limit = requests.batch, sampling.max_tokens
        keys = requests.keys.numpy().view(np.uint64)
        drafts = requests.drafts
        draft_lens = drafts.lens.numpy()
        assert draft_lens.max(initial=0) <= limit
        draft = np.zeros((batch, limit), dtype=np.int64)
        draft_logprobs = np.zeros((batch, limit))
        filled = np.arange(limit) < draft_lens[:, None]
        draft[filled] = drafts.token_ids.numpy()
        if drafts.logprobs is not None:
            draft_logprobs[filled] = drafts.logprobs.numpy()

        last = requests.prompt_ids.numpy()[requests.cu_prompt_lens.numpy()[1:] - 1].astype(np.int64)
        accepted_lens = np.zeros(batch, dtype=np.int32)
        lens = np.zeros(batch, dtype=np.int64)
        reasons = np.full(batch, FinishReason.LENGTH, dtype=np.uint8)
        tokens = np.zeros((batch, limit), dtype=np.int32)
        logprobs = np.zeros((batch, limit), dtype=np.float32)
        live = np.arange(batch)
        for t in range(limit):
            row_log_probs = log_probs[last[live]]
            in_draft = (accepted_lens[live] == t) & (t < draft_lens[live])
            token, accepted = _next_tokens(
                row_log_probs,
                keys[live],
                t,
                np.where(in_draft, draft[live, t], -1),
                draft_logprobs[live, t],
                acceptance,
            )
            accepted_lens[live] += accepted
            tokens[live, t] = last[live] = token
            logprobs[live, t] = row_log_probs[np.arange(live.size), token]
            lens[live] = t + 1
            stopped = np.isin(token, sampling.stop_token_ids)
            reasons[live[stopped]] = FinishReason.STOP
            if self.abort_after is not None:
                aborted = ~stopped & (live > self.abort_after)
                reasons[live[aborted]] = FinishReason.ABORT
                stopped |= aborted
            live = live[~stopped]

        written = np.arange(limit) < lens[:, None]
        num_reused = int(accepted_lens.sum())
        whole = (accepted_lens == draft_lens) & drafts.finished.numpy() & (draft_lens > 0)
        return Rollouts(
            prompt_ids=requests.prompt_ids,
            cu_prompt_lens=requests.cu_prompt_lens,
            response_ids=torch.from_numpy(tokens[written]),
            cu_response_lens=cu_lens_from(torch.from_numpy(lens)),
            logprobs=torch.from_numpy(logprobs[written]),
            accepted_lens=torch.from_numpy(accepted_lens),
            finish_reasons=torch.from_numpy(reasons),
            policy_version=self.policy_version,
            stats=RolloutStats(
                num_rollouts=batch,
                num_drafts=int((draft_lens > 0).sum()),
                num_draft_tokens=int(draft_lens.sum()),
                num_reused_tokens=num_reused,
                num_fully_reused=int(whole.sum()),
                num_response_tokens=int(lens.sum()),
                num_generated_tokens=int(lens.sum()) - num_reused,
            ),
        )


def _next_tokens(
    log_probs: np.ndarray,
    keys: np.ndarray,
    position: int,
    draft_ids: np.ndarray,
    draft_logprobs: np.ndarray,
    rule: AcceptanceRule,
) -> tuple[np.ndarray, np.ndarray]:
    """One token per row and whether it is the draft's. draft_ids is -1 where there is no draft."""
    kind, log_lenience, scale, min_target_prob = rule.kernel_params
    batch, vocab = log_probs.shape
    noise = uniforms(keys, position, np.arange(1, vocab + 1, dtype=np.uint64))
    scores = log_probs - np.log(-np.log(noise))
    log_u = np.log(uniforms(keys, position, np.zeros(1, dtype=np.uint64))[:, 0])
    rows, has_draft = np.arange(batch), draft_ids >= 0
    y = np.maximum(draft_ids, 0)
    p = log_probs[rows, y]
    if kind == RuleKind.COUPLED:
        scores[rows, y] += np.where(has_draft, log_lenience, 0.0)
        token = scores.argmax(-1)
        return token, has_draft & (token == y)
    if kind == RuleKind.ONE_HOT:
        accepted = has_draft & (log_u <= p)
        scores[rows[has_draft], y[has_draft]] = -np.inf  # only read where y was rejected
    else:
        if np.isinf(log_lenience):
            accepted = has_draft & (log_lenience > 0)
        else:
            accepted = has_draft & (log_u <= scale * (log_lenience + p - draft_logprobs))
        if min_target_prob > 0:
            accepted &= np.exp(p) > min_target_prob
    return np.where(accepted, y, scores.argmax(-1)), accepted
